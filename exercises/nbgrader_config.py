"""nbgrader's settings for this course; they apply where nbgrader runs inside `exercises/`. README.md shows a whole round of grading."""

c = get_config()  # noqa: F821  (nbgrader puts it here)

c.CourseDirectory.course_id = "minisd"
c.CourseDirectory.ignore = [".ipynb_checkpoints", "*.pyc", "__pycache__", "feedback", ".DS_Store"]

# Long enough for a slow laptop to import torch and take the few training steps that some exercises ask for.
c.ExecutePreprocessor.timeout = 180
c.Execute.timeout = 180

c.ClearSolutions.begin_solution_delimeter = "### BEGIN SOLUTION"
c.ClearSolutions.end_solution_delimeter = "### END SOLUTION"
c.ClearHiddenTests.begin_test_delimeter = "### BEGIN HIDDEN TESTS"
c.ClearHiddenTests.end_test_delimeter = "### END HIDDEN TESTS"
c.ClearSolutions.code_stub = {"python": "# YOUR CODE HERE\nraise NotImplementedError()"}
