"""slides/names.py: what an image is called by folders, tables and other tools; tables as people have them."""
import pytest

from common import UserError
from slides.names import match, name_of, read_table

GDC = "00a1-bb/TCGA-AA-3664-01Z-00-DX1.e8b7.svs", "11c2-dd/TCGA-AA-3664-01Z-00-DX2.f9c8.svs"

@pytest.mark.parametrize("names, known, means", [
    (["TCGA-AA-3664-01Z-00-DX1.e8b7"], GDC, {0: 0}),                    # CLAM leaves out folder and ending
    (["TCGA-AA-3664-01Z-00-DX2.f9c8.svs", "x"], GDC, {0: 1}),
    (["/data/11c2-dd/TCGA-AA-3664-01Z-00-DX2.f9c8.SVS"], GDC, {0: 1}),
    (["00a1-bb__TCGA-AA-3664-01Z-00-DX1.e8b7.svs"], GDC, {0: 0}),       # as our files are called
    (["other/TCGA-AA-3664-01Z-00-DX1.e8b7.svs", "TCGA-AA-3664-01Z-00-DX1"], GDC, {}),
    (["a", "a.svs"], ["a.svs", "a"], {0: 1, 1: 0}), (["a.png"], ["a.svs"], {}), (["a.ome.tif"], ["a"], {0: 0}),
    (["a.ome.tif", "b.ome"], ["a.ome", "b"], {0: 0, 1: 1}), (["a.ome.tif"], ["a.svs", "a.tif"], {}),
    (["100.0", "7"], ["100", "7.0"], {0: 0, 1: 1}), (["1"], ["10", "01"], {}), (["tumor/1"], ["normal/1"], {}),
    (["x/1", "y/1"], ["y/1.svs", "x/1.svs"], {0: 1, 1: 0})])
def test_names_of_one_image(names, known, means):
    """catches: what follows the last dot taken for an ending; another folder's image; 10 for 1."""
    assert match(names, known, "here") == {names[a]: known[b] for a, b in means.items()}

def test_names_that_mean_two_are_refused():
    for names, known, says in ((["a"], ["x/a", "y/a"], "l.csv: a can be x/a or y/a"),
                               (["x/a", "y/a"], ["a"], "l.csv: x/a and y/a can both be a"),
                               (["a"], ["a.svs", "a.tif"], "a can be a.svs or a.tif")):
        with pytest.raises(UserError, match=says):
            match(names, known, "l.csv")
    assert name_of("f/u__a.svs.h5") == "u__a.svs" and name_of("f/a/features.npy") == "a"

ROWS = [{"case_id": "P 1", "slide_id": "a", "label": "Größe, x"}, {"case_id": "", "slide_id": "7", "label": "1"}]

@pytest.mark.parametrize("text, encoding", [
    ('case_id,slide_id,label\nP 1,a,"Größe, x"\n,7,1\n', "utf-8"),
    ("case_id;slide_id;label\nP 1;a;Größe, x\n;7;1", "latin-1"),
    ("Case ID\t Slide_ID \tLABEL\r\nP 1\ta\tGröße, x\r\n\r\n\t7\t1\r\n", "utf-16"),
    ('case-id, slide_id, label\nP 1, a, "Größe, x"\n, 7, 1\n', "utf-8-sig"),
    ("case_id;slide_id;label\rP 1;a;Größe, x\r;7;1\r", "utf-16-le"),
    ("caseId,SlideID,Label\nP 1,a,\"Größe, x\"\n,7,1", "utf-8"),
    ("sep=;\r\nCase Id;SLIDE ID;Label;\nP 1;a;Größe, x;\n;7;1;\n", "cp1252")])
def test_tables(tmp_path, text, encoding):
    (tmp_path / "l.csv").write_bytes(text.encode(encoding))
    rows = read_table(tmp_path / "l.csv", ("slide_id", "label"))
    assert [{key: row[key] for key in ROWS[0]} for row in rows] == ROWS

def test_tables_that_are_refused(tmp_path):
    for raw, says in ((b"PK\x03\x04", "is a spreadsheet: save it as CSV"),
                      (b"slide_id,class\na,1", "no column label.*slide_id, cla"),
                      (b"slide_id,label\n", "or no row"), (b"", "no column slide_id, label"),
                      (b"label,slide_id,Label\na,b,c\n", "column label is there twice"),
                      (b"slide_id,label\na,1,2\n", "more cells than columns in a, 1, 2")):
        (tmp_path / "l.csv").write_bytes(raw)
        with pytest.raises(UserError, match=says):
            read_table(tmp_path / "l.csv", ("slide_id", "label"))
