"""For stock nbgrader, started in this folder: `nbgrader generate_assignment UNIT --force`, `nbgrader autograde UNIT`, formgrader.

`minillama course release` and `minillama course grade` do the same without a database; INSTRUCTORS.md compares the two ways.
"""
from pathlib import Path

root = Path(__file__).resolve().parent
(root / ".grading").mkdir(exist_ok=True)  # the database and everything that students hand in; git ignores it

c = get_config()  # noqa: F821 (nbgrader provides it)
c.CourseDirectory.course_id = "minillama"
c.CourseDirectory.root = str(root)
c.CourseDirectory.source_directory = "solutions"
c.CourseDirectory.release_directory = "exercises"
c.CourseDirectory.submitted_directory = ".grading/submitted"
c.CourseDirectory.autograded_directory = ".grading/autograded"
c.CourseDirectory.feedback_directory = ".grading/feedback"
c.CourseDirectory.solution_directory = ".grading/solution"
c.CourseDirectory.db_url = f"sqlite:///{root / '.grading' / 'gradebook.db'}"
c.OverwriteCells.add_missing_cells = True  # a deleted test cell comes back, and scores 0
c.IgnorePattern.enabled = True  # anything on stderr fails a cell: a warning must not
c.IgnorePattern.pattern = r"Warning"
c.Execute.timeout = 120  # seconds a cell
