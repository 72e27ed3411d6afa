"""What the bug hunts of all lessons share: a suspect is drawn by its seed, and whoever hunts has to name its bug.

A hunt has BUGS, the names of its bugs, of which number 0 is none; STEPS, one for each bug, as `named_right` takes them;
and, but for the one that hunts layers, `planted(seed)`, the suspect of a seed that a learner is shown.
"""

import random
from collections.abc import Callable, Iterator

from .exercise import Step, runs
from .observe import call


def bug_of(rng: random.Random, bugs: tuple[str, ...]) -> int:
    """The first thing that a seed decides."""
    return rng.randrange(len(bugs))


def draw(rng: random.Random, bugs: tuple[str, ...]) -> dict:
    """A seed for each bug, in any order: nothing that a learner's code finds on its way says which bug is which."""
    seeds = []
    for bug in rng.sample(range(len(bugs)), len(bugs)):
        seed = rng.getrandbits(32)
        while bug_of(random.Random(seed), bugs) != bug:
            seed = rng.getrandbits(32)
        seeds.append(seed)
    return {"seeds": seeds}


def observe(function, inputs: dict, planted: Callable) -> dict:
    seen = {}
    for seed in inputs["seeds"]:
        seen |= call(f"planted({seed})", function, planted(seed))
    return seen


def judge(inputs: dict, observed: dict, bugs: tuple[str, ...], steps: dict[int, tuple]) -> Iterator[Step]:
    seed_of = {bug_of(random.Random(seed), bugs): seed for seed in inputs["seeds"]}
    given = {
        bug: f"planted({seed}), with " + (f"bug {bug} ({bugs[bug]})" if bug else "no bug")
        for bug, seed in seed_of.items()
    }
    for bug in steps:
        yield from runs(observed, f"planted({seed_of[bug]})", (), given[bug], dtype="int")
    said = {bug: observed[f"planted({seed_of[bug]})/value"].item() for bug in steps}
    yield from named_right(bugs, steps, said, given, "suspects", "calls the suspect")


def named_right(
    bugs: tuple[str, ...], steps: dict[int, tuple], said: dict[int, int], given: dict[int, str], noun: str, use: str
) -> Iterator[Step]:
    """Of a bug hunt: each suspect's bug is named. Bug 0 is none.

    steps: bug -> (what is right when it is found, the question for any other answer, {answer: (name, question)}).
    said: the learner's answer to each; given: each suspect in words; noun, use: "layers" and "runs the layer".
    """

    def named(bug: int) -> str:
        return f"{bug} ({bugs[bug]})"

    odd = next((bug for bug in steps if said[bug] not in range(len(bugs))), 0)
    yield Step(
        "each answer is the number of a bug, or 0", said[odd] in range(len(bugs)), given[odd], str(said[odd]),
        f"0 to {len(bugs) - 1}", "Which numbers do the names above your function stand for?", "no bug",
    )  # fmt: skip
    yield Step(
        f"{noun} get different answers", len(set(said.values())) > 1, f"six {noun}, all different",
        f"six times {named(said[0])}", "six different answers",
        f"Which line of yours {use}, and which decides by what came out?", "one answer for all",
    )  # fmt: skip
    for bug, (step, question, known) in steps.items():
        mistake, asks = known.get(said[bug], ("", question))
        yield Step(step, said[bug] == bug, given[bug], named(said[bug]), named(bug), asks, mistake)
