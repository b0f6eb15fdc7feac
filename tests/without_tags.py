"""A transport with the point-to-point semantics of NCCL, as a model: which programs can run where messages have no tags."""

from __future__ import annotations

from collections import deque

from helixpipe.schedule.action import Action
from helixpipe.schedule.program import Program, Receive, Run, Send


class Deadlock(Exception):
    """No rank can go on, or a message was posted that nobody takes."""


class Mismatch(Exception):
    """The two ends of a pair's queue speak of different messages, or both send."""


def run_like_nccl(program: Program, blocking: bool = False) -> list[Action]:
    """Run a program on a transport with NCCL's point-to-point semantics; returns the actions in an order executed.

    Each pair of ranks shares one queue: the n-th post of one side meets the n-th post of the other, whatever
    their direction, no tags; a later one starts after the earlier are done. Posting returns at once; with `blocking`
    a rank stands at every post until the other end has come to it. That is the most that communicators made at
    first use, or one stream for all of a rank's messages, can ask.
    """
    posts: dict[tuple[int, int], tuple[deque, deque]] = {}
    done: set[int] = set()
    positions = [0] * len(program.ranks)
    standing: dict[int, int] = {}  # rank -> number of the message that it has posted and stands at
    executed = []

    def post(rank: int, instruction: Send | Receive) -> None:
        message = instruction.message
        low, high = sorted((message.src, message.dst))
        sides = posts.setdefault((low, high), (deque(), deque()))
        assert rank == (message.src if isinstance(instruction, Send) else message.dst)
        sides[rank == high].append(instruction)
        while sides[0] and sides[1]:
            ours, theirs = sides[0].popleft(), sides[1].popleft()
            if ours.message is not theirs.message or type(ours) is type(theirs):
                raise Mismatch(f"{ours} meets {theirs}")
            done.add(ours.message.number)

    moved = True
    while moved:
        moved = False
        for rank, instructions in enumerate(program.ranks):
            while positions[rank] < len(instructions):
                instruction = instructions[positions[rank]]
                if isinstance(instruction, Send | Receive):
                    number = instruction.message.number
                    if standing.get(rank) != number:
                        post(rank, instruction)
                    if blocking and number not in done:
                        standing[rank] = number
                        break
                else:
                    waits = instruction.waits if isinstance(instruction, Run) else (instruction.message,)
                    if any(message.number not in done for message in waits):
                        break
                    if isinstance(instruction, Run):
                        executed.append(instruction.action)
                positions[rank] += 1
                moved = True
    if any(at < len(instructions) for at, instructions in zip(positions, program.ranks, strict=True)):
        raise Deadlock(f"ranks stand at {positions}")
    if any(side for sides in posts.values() for side in sides):
        raise Deadlock("a message was posted by one side only")
    return executed
