"""The process in which the agent lives. It may die at any moment.

It tells its parent what it does, one JSON object a line on standard output: before a write it says
what it is about to do, and after it that the memory has acknowledged it. What arrived in the pipe
stays there when the process dies, so the parent knows what was promised without asking the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from agent import MEMORY, Agent
from world import Question, Scans, World

from expbuf_core import ExperienceBuffer


def tell(event: str, **facts: Any) -> None:
    """Write one line, past all of Python's buffers."""
    line = memoryview((json.dumps({"event": event, **facts}) + "\n").encode())
    while line:
        line = line[os.write(sys.stdout.fileno(), line) :]


def take_stock(memory: ExperienceBuffer, opened_in_s: float) -> None:
    """Tell all that was found in the memory, and how much of it searches find."""
    experiences = list(memory)
    began = time.perf_counter()
    found = sum(
        experience.id
        in [
            hit.id
            for hit in memory.search_index(
                v_embed=experience.v_embed, q_embed=experience.q_embed, k=4
            )
        ]
        for experience in experiences
    )
    tell(
        "found",
        experiences=[
            [
                experience.id,
                experience.answer,
                experience.total_reward,
                experience.retrieval_count,
                experience.success_count,
            ]
            for experience in experiences
        ],
        searchable=found,
        searched_in_s=time.perf_counter() - began,
        opened_in_s=opened_in_s,
        report=str(memory.recovery),
    )


def catch_up(memory: ExperienceBuffer, world: World) -> int:
    """Get the verdict that a dead process did not live to hear, or to pass on.

    Returns:
        Where in the stream to go on.
    """
    if not len(memory):
        return 0
    newest = memory.get(int(memory.ids()[-1]))
    position = int((newest.metadata or {})["position"])
    right = world.judge(position, newest.answer)
    if newest.total_reward is None:
        tell("judging", id=newest.id, neighbours=(), credit=())
        memory.update_rewards(memory.ids()[-1:], [1.0 if right else -1.0])
    tell("judged", position=position, right=right)
    return position + 1


def remember_aloud(memory: ExperienceBuffer, agent: Agent, question: Question) -> None:
    """Tell which experiences a question brings to mind, for the picture."""
    v, q = agent.sense(question)
    hits = [
        {
            "scan": int((hit.experience.metadata or {})["scan"]),
            "question": hit.experience.question,
            "answer": hit.experience.answer,
            "reward": hit.experience.total_reward,
            "similarity": float(hit.similarity),
        }
        for hit in memory.search_index(v_embed=v, q_embed=q, k=6)
    ]
    tell(
        "recalled",
        position=question.position,
        scan=question.scan,
        question=question.text,
        hits=hits,
    )


def live(agent: Agent, world: World, start: int, die_at: int) -> None:
    """Answer the questions of the stream from `start` on."""
    memory = agent.memory
    shown = world.last_of_each_kind() if memory is not None else ()
    for position in range(start, len(world)):
        question = world[position]
        if memory is not None and position in shown:
            remember_aloud(memory, agent, question)
        tell("answering", position=position)
        reply = agent.answer(question)
        consensus = reply.consensus
        if consensus is not None:
            tell("answered", position=position, id=consensus.experience_id, answer=reply.answer)
        if position == die_at:
            os.kill(os.getpid(), signal.SIGKILL)  # the answer is given, the verdict still open
        right = world.judge(position, reply.answer)
        if consensus is not None:
            neighbours = consensus.neighbours if consensus.used_memory else ()
            credit = consensus.credit if right else (0.0,) * len(neighbours)
            tell("judging", id=consensus.experience_id, neighbours=neighbours, credit=credit)
        agent.feedback(reply, right)
        tell("judged", position=position, right=right)
        agent.replay()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=Path, required=True, help="as written by Scans.write")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--questions", type=int)
    parser.add_argument("--memory", type=Path, help="folder of the memory; default: none")
    parser.add_argument("--no-recall", action="store_true")
    parser.add_argument("--no-replay", action="store_true")
    parser.add_argument("--durability", default="sync")
    parser.add_argument("--stock", action="store_true", help="tell what is in the memory")
    parser.add_argument("--die-at", type=int, default=-1, help="position of the last question")
    arguments = parser.parse_args()

    world = World(Scans.read(arguments.scans), arguments.seed, arguments.questions)
    if arguments.memory is None:
        live(Agent(None), world, 0, arguments.die_at)
        return
    began = time.perf_counter()
    with ExperienceBuffer.open(
        arguments.memory, config=MEMORY, durability=arguments.durability
    ) as memory:
        if arguments.stock:
            take_stock(memory, time.perf_counter() - began)
        agent = Agent(memory, recall=not arguments.no_recall, replay=not arguments.no_replay)
        start = catch_up(memory, world)
        began = time.perf_counter()
        experiences = agent.relive()
        tell("relived", experiences=experiences, seconds=time.perf_counter() - began)
        live(agent, world, start, arguments.die_at)


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(1)  # the parent was interrupted, or is gone
