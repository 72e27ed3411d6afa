"""Marks for the functions of a bank of answers: `@right`, and `@wrong("the mistake's name")`."""


def right(function):
    """A right answer that goes another way than the reference."""
    function.wrong = None
    return function


def wrong(mistake: str):
    """A wrong answer. Its check must fail and name this mistake or, where the message names none, this step."""

    def mark(function):
        function.wrong = mistake
        return function

    return mark
