import io

from kerasmed import progress


def test_bar_counts_on_from_what_is_done_in_plain_characters():
    file = io.StringIO()
    with progress.bar(4, "read", unit="file", done=2, file=file) as bar:
        assert bar.n == 2
        bar.update(2)
    assert "read: 100%" in file.getvalue() and "4/4" in file.getvalue() and file.getvalue().isascii()


def test_bar_that_is_not_shown_writes_nothing(capsys):
    with progress.bar(4, "read", shown=False) as bar:
        bar.update(4)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_bar_goes_to_standard_output(capsys):
    with progress.bar(1, "read") as bar:
        bar.update()
    captured = capsys.readouterr()
    assert "read" in captured.out and captured.err == ""
