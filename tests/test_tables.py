import os

import pandas as pd
import pytest

from kerasmed import tables

NEEDED = ("id", "label")
EXPECTED = "the columns id and label"
TEXT = "id,label,note\na.png,1,x\nb.png,,y\n"


@pytest.fixture
def read(tmp_path):
    """Function of a file's content: what `tables.read` makes of it."""

    def call(content, **options):
        (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        return tables.read(tmp_path / "t.csv", NEEDED, expected=EXPECTED, **options)

    return call


def test_read_gives_the_needed_columns_as_text(read):
    table = read(TEXT)
    assert list(table) == list(NEEDED) and table.dtypes.astype(str).tolist() == ["str", "str"]
    assert table.to_numpy().tolist() == [["a.png", "1"], ["b.png", ""]]
    assert read("id,label\n").empty


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode("utf-8-sig"),
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("\n", "\r"),
        TEXT.rstrip(),
        "\n \n" + TEXT.replace("\n", "\n,,\n\n"),
        TEXT.replace("\n", ",,\n"),
        TEXT.replace(",", " , "),
        '"id","label","note"\n"a.png","1","x, or\ny"\n"b.png","","5"" z"\n',
        "note,label,id,label of another\nx,1,a.png,0\ny,,b.png,0\n",
    ],
    ids=["BOM", "CRLF", "CR", "no end", "blank lines", "trailing commas", "spaces", "quotes", "other order"],
)
def test_read_gives_the_same_whatever_wrote_the_csv(read, content):
    pd.testing.assert_frame_equal(read(content), read(TEXT))


def test_read_others_are_all_columns_with_a_name_in_the_file_s_order(read):
    assert list(read(",note,label,id,\n0,x,1,a.png,\n", others=True)) == ["note", "label", "id"]
    with pytest.raises(ValueError, match=r"has the columns \['note'\] twice"):
        read("id,label,note,note\na,1,,\n", others=True)
    assert len(read("id,label,note,note\na,1,,\n")) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; write the columns id and label"),
        ("\n,\n \n", "is empty"),
        ("id\na\n", r"lacks the columns \['label'\]; it has \['id'\]: name them so, or restore the file"),
        ("id;label\na;1\n", r"it has \['id;label'\]: separate columns by commas, not by ';'"),
        ("id\tlabel\na\t1\n", r"separate columns by commas, not by '\\t'"),
        ("id,label,id\na,1,b\n", r"has the columns \['id'\] twice; rename or remove one of each"),
        ("id,label\na,1\nid,label\nb,0\n", "line 3, repeats the line of column names; keep the first"),
        ("id,label\na,1\nb\nc,0\n", r"1 of 3 rows have fewer than 2 cells, or more than 2 \(line 3 has 1\)"),
        ("id,label\na,1\n\nb,0,5\n", r"1 of 2 rows have .* more than 2 \(line 4 has 3\).*put quotes round a cell"),
        ('id,label\n"a,1\nb,0\n', "no readable CSV: line 3: unexpected end of data. Close every quote. Expected the"),
        (f"id,label\n{'a' * 1001},1\n", "line 2: a cell of 1,001 characters in column id; expected at most 1,000"),
        (f"id,label\n{'a' * 200_000},1\n", r"no readable CSV: line 2: field larger than field limit \(131072\)"),
        ("id,label\na,ä\n".encode("latin-1"), "is not in UTF-8 .byte 0xe4 in line 2.; save it as a CSV in UTF-8"),
        ("id,label\na,1\n".encode("utf-16"), "is not in UTF-8 .it begins as UTF-16 does.; save it"),
        ("id,label\na,1\n".encode("utf-16-le"), "has 13 NUL bytes, the first in line 1: it is broken, or in UTF-16; "),
    ],
)
def test_read_what_does_not_fit_is_refused_with_the_file_s_name_and_the_mend(read, content, message):
    with pytest.raises(ValueError, match=f"t.csv.*{message}"):
        read(content)


def test_read_of_many_columns_shows_the_first(read):
    with pytest.raises(ValueError, match=r"'n19'\] and 180 more: ") as raised:
        read(",".join(f"n{number}" for number in range(200)))
    assert len(str(raised.value)) < 500


def test_read_of_what_is_no_file_is_refused(tmp_path):
    for name in ("folder.csv", "pipe.csv", "link.csv", "absent.csv", "huge.csv"):
        path = tmp_path / name
        kind, message = {
            "folder.csv": (ValueError, "is a folder; put a file there, with the columns id and label"),
            "pipe.csv": (ValueError, "is no regular file"),  # which would be waited for
            "link.csv": (FileNotFoundError, "is absent, a link to nowhere that is not there; expected the columns"),
            "absent.csv": (FileNotFoundError, "is absent; expected the columns id and label"),
            "huge.csv": (ValueError, "has 1,073,741,825 bytes; expected at most 1,073,741,824"),
        }[name]
        if name == "folder.csv":
            path.mkdir()
        elif name == "pipe.csv":
            os.mkfifo(path)
        elif name == "link.csv":
            path.symlink_to("nowhere")
        elif name == "huge.csv":
            with path.open("wb") as file:
                file.truncate(2**30 + 1)
        with pytest.raises(kind, match=f"{name} {message}"):
            tables.read(path, NEEDED, expected=EXPECTED)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_read_of_a_file_that_must_not_be_read_says_so(tmp_path):
    (tmp_path / "t.csv").write_text(TEXT)
    (tmp_path / "t.csv").chmod(0)
    with pytest.raises(PermissionError, match="t.csv must not be read by this user; allow it"):
        tables.read(tmp_path / "t.csv", NEEDED, expected=EXPECTED)
