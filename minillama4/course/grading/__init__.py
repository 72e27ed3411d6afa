"""An instructor's side: a class's notebooks in, verdicts and a report out. Start with `grade.py`.

    intake -> plan -> sandbox (box.py: cells, then `observe`) -> arrays -> nbval over graded notebooks -> report

A learner's code runs only inside the sandbox, and what comes out of it is arrays. Everything that decides (`draw`,
`judge`, the instructor's copy) stays outside. Whoever forges arrays for inputs drawn a minute ago has solved the task.
"""
