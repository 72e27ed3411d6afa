"""One file an exercise; `course/exercise.py` says what is in it."""
