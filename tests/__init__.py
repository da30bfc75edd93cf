"""The tests, a file for each subject; the files tools*.py are what they share."""
