"""Tables, folders and manifests with one damage each: read right, refused with a reason, or set aside with one."""

import shutil
from collections import Counter

import pytest

from tests.reliability import corpus_layouts as layouts
from tests.reliability import corpus_tables as corpus

CASES = [*corpus.of_tables(), *layouts.folders(), *layouts.manifests()]
KINDS = list(dict.fromkeys(case.kind for case in CASES))


class Bench:
    """Sound trees, and a copy of each to damage, of which one file at a time is put right again."""

    def __init__(self, trees, folder):
        self.trees, self.folder = trees, folder
        self.copies = {name: corpus.copy(root, folder / name) for name, root in trees.items()}
        self.known, self.count = {}, 0

    def sound(self, case):
        """What the sound tree is read as, and the warnings of that."""
        key = case.tree, case.read
        if key not in self.known:
            self.known[key] = corpus.read_with_notes(case.read, self.trees[case.tree])
        return self.known[key]

    def look(self, case):
        """Damage, read, and put right; see `corpus.look`."""
        only = getattr(case.damage, "only", None)
        if only:
            root = self.copies[case.tree]
        else:
            self.count += 1
            root = corpus.copy(self.trees[case.tree], self.folder / f"{self.count}")
        case.damage(root)
        try:
            return corpus.look(case, root, *self.sound(case))
        finally:
            shutil.rmtree(root / only) if only and (root / only).is_dir() else (root / (only or "none")).unlink(True)
            if only:
                shutil.copyfile(self.trees[case.tree] / only, root / only)

    def look_at_all(self, cases):
        """What came of each case, counted, and what was wrong."""
        seen, wrong = Counter(), []
        for case in cases:
            try:
                seen[self.look(case)] += 1
            except Exception as error:  # of any type: what is not foreseen is what is looked for
                wrong.append(
                    f"{case.kind} of {case.tree} ({case.read.__name__}): {type(error).__name__}: {error}"[:600]
                )
        return seen, wrong


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The synthetic trees."""
    return Bench(corpus.plant(tmp_path_factory.mktemp("sound")), tmp_path_factory.mktemp("damaged"))


@pytest.mark.parametrize("kind", KINDS)
def test_each_damage_ends_as_it_must(kind, bench, record):
    seen, wrong = bench.look_at_all([case for case in CASES if case.kind == kind])
    assert not wrong, "\n".join(wrong)
    record("Tables", kind, seen)


def test_the_corpus_has_enough_of_every_tree():
    counts = Counter(case.tree for case in CASES)
    assert len(CASES) >= 200 and set(counts) == {"brain", "chest", "lumbar", "mura", "tritask", "manifest"}


def test_real_chest_tables_damaged_likewise(real_data, tmp_path, record):
    bench = Bench({"chest": corpus.excerpt(real_data, tmp_path / "sound")}, tmp_path / "damaged")
    tables = [table for table in corpus.TABLES if table.tree == "chest"]
    cases = [case for table in tables for make in (corpus.harmless, corpus.harmful) for case in make(table)]
    seen, wrong = bench.look_at_all(cases)
    assert not wrong, "\n".join(wrong)
    sound, _ = bench.known["chest", corpus.chest.read_table]
    assert 50 <= len(sound) <= 200
    record("Tables", "tables of some patients of ChestX-ray14, damaged in these ways", seen)
