"""The command line; `minillama4 --help` lists the commands. Bad input is one line on stderr and exit code 2."""

import argparse
import sys
from importlib.resources import files
from pathlib import Path

# Commands import what they need when they run, so that `minillama4 --help` answers at once.

DEMO = (  # bundled picture, question, the right answer
    ("one.png", "How many objects are there?", "5"),
    ("two.png", "Qu'y a-t-il en haut à droite ?", "triangle bleu"),
    ("three.png", "أي شكل لونه أزرق؟", "مربع"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a wrong result of `demo`, 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (ValueError, OSError) as error:
        print(f"minillama4: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minillama4: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minillama4", description="A compact Llama 4 that runs on a laptop.")
    commands = parser.add_subparsers(required=True, metavar="command")

    ask = commands.add_parser("ask", help="ask a trained model about a picture")
    ask.add_argument("picture", help="a PNG or JPEG file, or - for a question without a picture")
    ask.add_argument("question", help="in English, French, Hindi or Arabic")
    ask.add_argument("--model", default="mini-scout", help="a preset that ships weights, or a checkpoint folder")
    ask.add_argument("--explain", action="store_true", help="show the token layout, each token's experts, and the time")
    ask.set_defaults(run=_ask)

    demo = commands.add_parser("demo", help="ask mini-scout about three bundled pictures")
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="train a mini model, or go on with a stopped run")
    train.add_argument("preset", help="mini-scout or mini-maverick")
    train.add_argument("--out", help="folder of the run (default: runs/PRESET)")
    train.add_argument("--steps", type=_positive, help="training steps (default: the recipe's)")
    train.add_argument("--seed", type=int, default=0)
    train.set_defaults(run=_train)

    bench = commands.add_parser("bench", help="measure speed beside transformers, with equal results")
    bench.add_argument(
        "what",
        choices=["cpu", "long", "gpu"],
        help="cpu: ratios; long: memory of a 1M-token prompt; gpu: Scout in int4",
    )
    bench.add_argument("--json", "--out", metavar="FILE", help="write the result there too")
    bench.add_argument("--rounds", type=_positive, help="timed rounds of each case")
    bench.add_argument("--quick", action="store_true", help="small sizes: a check that it runs, not a measurement")
    bench.set_defaults(run=_bench)

    budget = commands.add_parser("budget", help="will it fit on a GPU, and how fast can it be there at best?")
    budget.add_argument("model", help="a preset, such as scout, or a model of another family, such as llama-3.1-8b")
    budget.add_argument("--dtype", default="bf16", help="of the weights: bf16, fp8, int4 … (default: bf16)")
    budget.add_argument("--context", default="8K", metavar="TOKENS", help="8192, 128K, 1M … (default: 8K)")
    budget.add_argument("--batch", default="1", metavar="N", help="sequences at a time (default: 1)")
    budget.add_argument("--kv-dtype", default="bf16", help="of the KV cache: bf16 or fp8 (default: bf16)")
    budget.add_argument("--gpu", default="h100", help="h100 or h200 (default: h100)")
    budget.add_argument("--json", action="store_true", help="print JSON instead of a table")
    budget.set_defaults(run=_budget)

    needle = commands.add_parser("needle", help="find one pair among millions of tokens (lesson 02)")
    needle.add_argument("--tokens", default="1M", help="of the context: 65536, 256K, 1M, 10M … (default: 1M)")
    needle.add_argument("--questions", type=_positive, default=20, metavar="N", help="needles (default: 20)")
    needle.add_argument("--seed", type=int, default=0)
    needle.set_defaults(run=_needle)

    lab = commands.add_parser("lab", help="open the course in JupyterLab, on copies of your own in work/")
    lab.add_argument("jupyter", nargs="*", metavar="OPTION", help="for JupyterLab: minillama4 lab -- --port=9999")
    lab.set_defaults(run=_lab)

    reset = commands.add_parser("reset", help="fetch one notebook from the course again, keeping a backup of yours")
    reset.add_argument("name", help="02, or notebooks/02 for the lesson and exercises/02 for the exercise")
    reset.set_defaults(run=_reset)

    doctor = commands.add_parser("doctor", help="is everything there that the course needs?")
    doctor.set_defaults(run=_doctor)

    check = commands.add_parser("check", help="run a notebook of exercises and show what its checks say")
    check.add_argument("notebook", help="such as work/exercises/02_irope.ipynb")
    check.set_defaults(run=_check)

    progress = commands.add_parser("progress", help="show which exercises are solved")
    progress.set_defaults(run=_progress)

    grade = commands.add_parser("grade", help="grade a class's notebooks in a sandbox, and write a report")
    grade.add_argument(
        "submissions", type=Path, help="a folder or zip file; docs/instructors.md says what may be in it"
    )
    grade.add_argument("--out", type=Path, required=True, help="folder of the report; a stopped run goes on in it")
    grade.add_argument("--seed", help="what the checks draw from (default: a new one, which the report names)")
    grade.add_argument(
        "-j", "--jobs", type=_positive, default=0, help="notebooks at a time (default: a processor each)"
    )
    grade.add_argument(
        "--feedback", type=Path, metavar="DIR", help="write each learner's notebook with the verdicts there"
    )
    grade.add_argument("--copies", type=Path, metavar="DIR", help="the solved notebooks (default: solutions/)")
    grade.add_argument(
        "--seconds", type=_positive, default=60, help="for a cell, and for a look at a function (default: 60)"
    )
    grade.add_argument("--memory", type=_positive, default=4, metavar="GB", help="for a submission (default: 4)")
    grade.add_argument("--trusted", action="store_true", help="no sandbox: submissions may do whatever you may")
    grade.set_defaults(run=_grade)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return value


def _ask(options) -> int:
    from .ask import ask, explain

    picture = None if options.picture == "-" else options.picture
    print((explain if options.explain else ask)(picture, options.question, options.model))
    return 0


def _demo(options) -> int:
    from .ask import ask

    wrong = 0
    for name, question, expected in DEMO:
        answer = ask(str(files("minillama4") / "pictures" / name), question)
        right = answer == expected
        wrong += not right
        print(f"{name:<10} {question:<46} {answer}" + ("" if right else f"   (right would be: {expected})"))
    return 1 if wrong else 0


def _train(options) -> int:
    from .train_command import train_command

    print(train_command(options.preset, options.out, options.steps, options.seed))
    return 0


def _bench(options) -> int:
    if options.what == "gpu":
        if options.rounds or options.quick:
            raise ValueError("bench gpu has one size and takes 8 minutes; --rounds and --quick are for cpu and long")
        from .bench_gpu import bench_gpu_command

        return bench_gpu_command(options.json)
    from .bench import bench_command

    return bench_command(options.what, options.json, options.rounds, options.quick)


def _budget(options) -> int:
    from .roofline import budget_command

    o = options
    print(budget_command(o.model, o.dtype, o.context, o.gpu, o.batch, o.kv_dtype, o.json))
    return 0


def _needle(options) -> int:
    from .course.needle import needle_command

    print(needle_command(options.tokens, options.questions, options.seed))
    return 0


def _lab(options) -> int:
    from .course.lab import start

    return start(options.jupyter)


def _reset(options) -> int:
    from .course.lab import reset

    print(reset(options.name))
    return 0


def _doctor(options) -> int:
    from .course.doctor import doctor

    return doctor()


def _check(options) -> int:
    from .course.checking import check_notebook

    return check_notebook(options.notebook)


def _progress(options) -> int:
    from .course.checking import progress_text
    from .course.lab import find_work

    print(progress_text(find_work()))
    return 0


def _grade(options) -> int:
    from .course.grading.grade import Options, grade

    given = {name: value for name, value in vars(options).items() if name != "run"}
    return grade(Options(**given))


if __name__ == "__main__":
    sys.exit(main())
