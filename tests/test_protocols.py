"""What `data/README.md` and the configs say of scripts and protocols, against the scripts."""

import re

import pytest

from common.config import load_config
from tests.preparing import ALL, REPOSITORY, SCRIPTS


def test_the_documentation_names_every_script() -> None:
    text = (REPOSITORY / "data/README.md").read_text()
    assert [script for script in ALL if f"python data/{script} " not in text] == []


def words_of_methods(text: str) -> set[str]:
    return set(re.findall(r"\b[A-Z]\w*[A-Z]\w*\b", text))


def test_the_table_of_protocols_says_what_the_scripts_do() -> None:
    text = (REPOSITORY / "data/README.md").read_text()
    table = text.partition("### Protocols")[2].partition("|---")[2].partition("\n\n")[0].splitlines()[1:]
    told: dict[str, list[tuple[str, int, int, set[str]]]] = {}
    title = ""
    for line in table:
        name, protocols, pairs, labels, _, papers = (cell.strip() for cell in line.strip("|").split("|"))
        title = name or title
        for protocol in re.findall("`([^`]+)`", protocols):
            row = (protocol, int(pairs.replace(",", "")), int(labels), words_of_methods(papers))
            told.setdefault(title, []).append(row)
    titles = ["MIRFlickr-25K", "NUS-WIDE", "MS COCO", "Wikipedia", "IAPR TC-12"]
    assert list(told) == titles
    for title, script in zip(titles, SCRIPTS.values(), strict=True):
        assert [row[:3] for row in told[title]] == [
            (name, protocol.known["pairs"], protocol.known["labels"]) for name, protocol in script.PROTOCOLS.items()
        ]
        for row, protocol in zip(told[title], script.PROTOCOLS.values(), strict=True):
            assert title == "MS COCO" or row[3] == words_of_methods(protocol.papers)


PERMUTED = {"dcmht": (1814, 5000, 10000), "mith": (1, 5000, 10000)}


MITHS_OWN = {"mirflickr25k": (1, 2000, 10000), "nuswide": (1, 2100, 10500)}


@pytest.mark.parametrize("name", ["mirflickr25k", "nuswide", "coco"])
def test_configs_deal_pairs_out_as_the_papers_of_their_protocol(name: str) -> None:
    tried = 0
    for protocol, split in PERMUTED.items():
        for method in words_of_methods(SCRIPTS[name].PROTOCOLS[protocol].papers) - {"CFRH", "DCMH"}:
            found = load_config(str(REPOSITORY / f"configs/{method}/{name}.yaml"), []).dataset.split
            expected = MITHS_OWN.get(name, split) if protocol == "mith" else split
            assert (found.protocol, found.seed, found.query, found.train) == ("permutation", *expected), method
            tried += 1
    assert tried >= 8
