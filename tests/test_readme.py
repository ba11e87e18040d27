import re

import pytest

from tests.processes import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py")))
def test_the_readme_says_what_each_file_is(script):
    assert re.search(rf"^\|.*`{re.escape(script)}`", README, re.M)


def test_the_files_that_the_readme_points_to_are_there():
    for link in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / link).exists(), link
