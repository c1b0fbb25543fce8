"""`init`, `snapshot`, `builder`, `reindex`: making a buffer, and keeping it in shape."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from expbuf_core.cli import output
from expbuf_core.cli.arguments import WrongUsage, idle_seconds, natural, positive


def add_to(commands: Any) -> None:
    """Add these commands to the parser."""
    init = commands.add_parser("init", help="make an empty buffer")
    init.add_argument("folder", help="new or empty")
    init.add_argument("--config", metavar="FILE", help="a YAML file; options below go before it")
    init.add_argument("--max-size", type=positive, metavar="N", help="most experiences")
    init.add_argument(
        "--v-dim", type=natural, metavar="N", help="of v_embed; default: the first add's"
    )
    init.add_argument("--q-dim", type=natural, metavar="N", help="of q_embed; likewise")
    init.add_argument("--metric", choices=["cosine", "inner_product", "l2"])
    init.add_argument("--fusion", metavar="NAME", help="such as weighted_sum, weighted_concat")
    init.add_argument("--persistence", metavar="NAME", help="such as file, lmdb")
    init.add_argument("--json", action="store_true", help="for programs")
    init.set_defaults(run=_init)

    snapshot = commands.add_parser("snapshot", help="write a snapshot and drop what it replaces")
    snapshot.add_argument("folder")
    snapshot.add_argument("--json", action="store_true", help="for programs")
    snapshot.set_defaults(run=_snapshot)

    builder = commands.add_parser("builder", help="build the index whenever enough has changed")
    builder.add_argument("folder")
    builder.add_argument("--config", metavar="JSON", help="sections index and snapshot, as JSON")
    builder.add_argument(
        "--idle-s", type=idle_seconds, metavar="S", help="end after so many seconds without work"
    )
    builder.add_argument(
        "--hurry", action="store_true", help="compete for processors, if at the lowest priority"
    )
    builder.set_defaults(run=_builder, interrupted="the old index stays in use")

    reindex = commands.add_parser("reindex", help="another fusion, metric or index, while in use")
    reindex.add_argument("folder")
    reindex.add_argument("--config", metavar="FILE", help="a YAML file; options below go before it")
    reindex.add_argument("--fusion", metavar="NAME", help="such as weighted_sum, weighted_concat")
    reindex.add_argument("--metric", choices=["cosine", "inner_product", "l2"])
    reindex.add_argument("--index", metavar="NAME", help="such as faiss_cpu, exact")
    reindex.add_argument("--json", action="store_true", help="for programs")
    reindex.set_defaults(run=_reindex, interrupted=output.RESUMABLE)


def _init(options: argparse.Namespace) -> int:
    from expbuf_core.buffer import ExperienceBuffer
    from expbuf_core.errors import ConfigError

    embedding = {
        "visual_dim": options.v_dim,
        "question_dim": options.q_dim,
        "metric": options.metric,
    }
    overrides: dict[str, Any] = {
        "max_size": options.max_size,
        "embedding": {name: value for name, value in embedding.items() if value is not None},
        "fusion": options.fusion,
        "persistence": options.persistence,
    }
    given = {name: value for name, value in overrides.items() if value not in (None, {})}
    with ExperienceBuffer.open(
        options.folder, mode="x", config=options.config, index__builder="off", **given
    ) as buffer:
        if buffer.path is None:
            raise ConfigError("persistence: this backend keeps nothing when its process ends")
        facts = {"folder": str(buffer.path), **buffer.stats()["settings"]}
    if options.json:
        output.print_json(facts)
    else:
        print(f"{facts['folder']}: an empty buffer for {facts['max_size']} experiences")
    return 0


def _snapshot(options: argparse.Namespace) -> int:
    from expbuf_core.buffer import ExperienceBuffer

    with ExperienceBuffer.load_from_disk(options.folder) as buffer:
        lsn = buffer.save_snapshot()
    if options.json:
        output.print_json({"lsn": lsn})
    else:
        print(f"snapshot of lsn {lsn}")
    return 0


def _reindex(options: argparse.Namespace) -> int:
    from expbuf_core.plugins import default_registry
    from expbuf_core.reindexing import reindex

    if options.index is not None:  # who names one wants that one, and no fallback
        default_registry().get("index", options.index)
    given = {
        "fusion": options.fusion,
        "embedding__metric": options.metric,
        "index__backend": options.index,
    }
    with output.progress("fusing and building") as shown:
        report = reindex(
            options.folder,
            config=options.config,
            progress=None if shown is None else lambda _, done, total: shown(done, total),
            **{name: value for name, value in given.items() if value is not None},
        )
    if options.json:
        output.print_json(dataclasses.asdict(report))
    else:
        text = f"{report.experiences} experiences are indexed anew"
        print(f"{text}, as representation {report.representation} from lsn {report.lsn}")
    return 0


def _builder(options: argparse.Namespace) -> int:
    from expbuf_core.builder import builder_config
    from expbuf_core.builder import main as build
    from expbuf_core.errors import ConfigError

    try:
        builder_config(json.loads(options.config or "{}"))
    except ConfigError as exc:
        raise WrongUsage(f"argument --config: {exc}") from exc
    except ValueError as exc:
        raise WrongUsage(f"argument --config: expected JSON: {exc}") from exc
    return build(
        options.folder,
        options.config,
        options.idle_s,
        whole=options.own_process,
        hurry=options.hurry,
    )
