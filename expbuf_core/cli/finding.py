"""`get`, `search`, `sample`: experiences, one by one. They disturb nobody."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expbuf_core.cli import output
from expbuf_core.cli.arguments import WrongUsage, natural, positive
from expbuf_core.errors import InvalidExperience, NotEnoughExperiences

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from expbuf_core.experience import Experience

_ANSWER_WIDTH = 40


def add_to(commands: Any) -> None:
    """Add these commands to the parser."""
    get = commands.add_parser("get", help="experiences by their ids")
    get.add_argument("folder")
    get.add_argument("ids", type=int, nargs="+", metavar="ID")
    get.add_argument("--embeddings", action="store_true", help="all of their numbers")
    get.add_argument("--json", action="store_true", help="for programs: one line of JSON each")
    get.set_defaults(run=_get)

    search = commands.add_parser("search", help="the most similar experiences, and why")
    search.add_argument("folder")
    search.add_argument("--id", type=int, metavar="ID", help="similar to this one, without it")
    search.add_argument("--visual", metavar="FILE", help="v_embed: an npy file, or numbers in JSON")
    search.add_argument("--question", metavar="FILE", help="q_embed, likewise")
    search.add_argument("--vector", metavar="FILE", help="the fused vector, in place of both")
    search.add_argument("-k", type=positive, default=10, help="how many; default: 10")
    search.add_argument("--tag", action="append", default=[], help="only those with this tag")
    search.add_argument("--exact", action="store_true", help="compare with all, without an index")
    search.add_argument("--explain", action="store_true", help="the similarity taken apart")
    search.add_argument("--config", metavar="FILE", help="a YAML file")
    search.add_argument("--json", action="store_true", help="for programs")
    search.set_defaults(run=_search)

    sample = commands.add_parser("sample", help="draw experiences as a learner would")
    sample.add_argument("folder")
    sample.add_argument("-n", type=positive, default=10, help="how many; default: 10")
    sample.add_argument("--seed", type=natural, help="the same draw again")
    sample.add_argument("--uniform", action="store_true", help="without regard to priorities")
    sample.add_argument("--config", metavar="FILE", help="a YAML file: alpha, beta, ageing")
    sample.add_argument("--json", action="store_true", help="for programs")
    sample.set_defaults(run=_sample)


def _get(options: argparse.Namespace) -> int:
    from expbuf_core.inspection import columns_of

    with columns_of(options.folder) as buffer:
        for i, id_ in enumerate(options.ids):
            experience = buffer.get(id_)
            if options.json:
                output.print_json(_document(experience))
                continue
            if i:
                print()
            output.pairs(_described(experience, whole=options.embeddings))
    return 0


def _document(experience: Experience) -> dict[str, Any]:
    """An experience for a program: the columns of an export, and the embeddings."""
    from expbuf_core.exchange_records import record_of

    record = record_of(experience, 0)
    del record["sequence"]
    image = record.pop("image_bytes")
    record["image_bytes"] = None if image is None else len(image)
    return {**record, "v_embed": experience.v_embed, "q_embed": experience.q_embed}


def _described(experience: Experience, *, whole: bool) -> list[tuple[str, Any]]:
    import numpy as np

    e = experience
    stamp = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(e.timestamp or 0))
    described: list[tuple[str, Any]] = [
        ("id", e.id), ("time", stamp), ("question", e.question or None), ("answer", e.answer),
        ("confidence", e.confidence), ("reward", e.total_reward),
        ("rewards", None if e.rewards is None else dict(e.rewards)),  # type: ignore[arg-type]
        ("priority", e.priority), ("retrieved", e.retrieval_count), ("right", e.success_count),
        ("tags", ", ".join(e.tags) or None), ("key", e.key), ("metadata", e.metadata),
        ("trajectory", e.trajectory),
        ("image", f"{len(e.image)} bytes" if isinstance(e.image, bytes) else e.image),
        ("probabilities", e.probabilities),
    ]  # fmt: skip
    for name in ("v_embed", "q_embed"):
        values = getattr(e, name)
        if values is None:
            described.append((name, None))
        elif whole:
            described.append((name, json.dumps(values.tolist())))
        else:
            norm = float(np.linalg.norm(values))
            shown = np.array2string(values[:4], precision=4, separator=", ")[1:-1]
            more = ", …" if len(values) > 4 else ""
            described.append((name, f"({len(values)},) length {norm:.4g}: {shown}{more}"))
    return [(name, value) for name, value in described if value is not None]


def _vector(path: str | None) -> NDArray[np.float32] | None:
    """An embedding from a file."""
    import numpy as np

    if path is None:
        return None
    values: NDArray[np.float32]
    try:
        if Path(path).suffix == ".npy":
            # Not np.load, which takes anything else for a pickle, and advises to trust it.
            with open(path, "rb") as file:
                values = np.lib.format.read_array(file, allow_pickle=False)
        else:
            values = np.asarray(json.loads(Path(path).read_text("utf-8")), np.float32)
    except (ValueError, TypeError) as exc:
        raise InvalidExperience(f"{path}: neither an npy file nor numbers in JSON: {exc}") from exc
    except OSError as exc:
        raise InvalidExperience(f"{path}: cannot be read: {exc.strerror}") from exc
    return values.reshape(-1) if values.ndim == 2 and len(values) == 1 else values


def _search(options: argparse.Namespace) -> int:
    from expbuf_core.buffer import ExperienceBuffer
    from expbuf_core.explanation import explain

    embeddings = [options.visual, options.question]
    ways = (options.id is not None) + (options.vector is not None) + any(embeddings)
    if ways != 1:
        raise WrongUsage(
            f"{'too much' if ways else 'nothing'} to be similar to: name --id, or --vector, or "
            "--visual and --question, of which one may be missing"
        )
    query: dict[str, Any] = {
        "v_embed": _vector(options.visual),
        "q_embed": _vector(options.question),
        "hybrid_embed": _vector(options.vector),
    }
    overrides: dict[str, Any] = {"index": {"backend": "exact"}} if options.exact else {}
    with ExperienceBuffer.open(
        options.folder, mode="r", config=options.config, **overrides
    ) as buffer:
        exclude: list[int] = []
        if options.id is not None:
            experience = buffer.get(options.id)
            query = {"v_embed": experience.v_embed, "q_embed": experience.q_embed}
            exclude = [options.id]
        tags = options.tag
        where = (lambda columns: columns.has_tag(*tags)) if tags else None
        found = buffer.search_index(**query, k=options.k, where=where, exclude=exclude)
        reasons = explain(buffer, found, **query)
        answers = [output.plain(hit.experience.answer) for hit in found]
    if options.json:
        hits = [
            {**reason._asdict(), "answer": answer}
            for reason, answer in zip(reasons, answers, strict=True)
        ]
        output.print_json({"lsn": found.lsn, "receipt": str(found.receipt), "hits": hits})
        return 0
    columns = ["rank", "id", "similarity", "tier", "confidence", "retrieved", "right", "reward"]
    if options.explain:
        columns += ["exact", "visual", "question", "backend", "rate", "priority", "age"]
    rows = []
    for reason, answer in zip(reasons, answers, strict=True):
        row: list[Any] = [
            reason.rank, reason.id, reason.similarity, reason.tier, reason.confidence,
            reason.retrieval_count, reason.success_count, reason.reward,
        ]  # fmt: skip
        if options.explain:
            row += [
                reason.exact, reason.visual, reason.question, reason.backend,
                reason.success_rate, reason.priority, output.duration(reason.age_s),
            ]  # fmt: skip
        rows.append([*row, output.shortened(answer, _ANSWER_WIDTH)])
    output.table([*columns, "answer"], rows)
    return 0


def _sample(options: argparse.Namespace) -> int:
    import numpy as np

    from expbuf_core.inspection import columns_of

    with columns_of(options.folder, config=options.config) as buffer:
        if not len(buffer):
            raise NotEnoughExperiences(f"{options.folder} is empty: nothing can be sampled")
        rng = np.random.default_rng(options.seed)
        batch = buffer.sample(options.n, rng=rng, uniform=options.uniform)
        rows = [
            {
                "id": int(id_),
                "probability": float(batch.probabilities[i]),
                "is_weight": float(batch.is_weights[i]),
                "priority": float(batch.priority[i]),
                "reward": float(batch.total_reward[i]),
                "answer": output.plain(batch.experiences[i].answer),
            }
            for i, id_ in enumerate(batch.ids)
        ]
    if options.json:
        output.print_json({"lsn": batch.lsn, "draws": rows})
        return 0
    for row in rows:
        row["reward"] = None if row["reward"] != row["reward"] else row["reward"]
        row["answer"] = output.shortened(str(row["answer"]), _ANSWER_WIDTH)
    output.table(list(rows[0]), [list(row.values()) for row in rows])
    return 0
