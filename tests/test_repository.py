"""CITATION.cff, the issue forms and the workflow are valid and agree with the project."""

import re
import subprocess
import tomllib

import pytest
import yaml

from tests.configs.reading import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read(path):
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture(scope="module")
def citation():
    return read("CITATION.cff")


def test_the_citation_has_what_its_schema_requires(citation):
    """Citation File Format 1.2.0."""
    assert citation["cff-version"] == "1.2.0"
    for each in (citation, *citation["references"]):
        assert each["title"] and each["authors"]
        assert all(set(author) in ({"family-names", "given-names"}, {"name"}) for author in each["authors"])
    assert citation["message"] and citation["type"] == "software"
    assert all(each["type"] in ("article", "conference-paper") for each in citation["references"])
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


def test_the_citation_names_the_papers_as_the_readme_does(citation):
    readme = " ".join((ROOT / "README.md").read_text().split())
    papers = citation["references"]
    assert len(papers) == 4
    for paper in papers:
        names = [author["family-names"] for author in paper["authors"]]
        number = paper["url"].rpartition("/")[2]
        listed = re.escape(f"{', '.join(names[:-1])} and {names[-1]}, ").replace(r"\ ", " ")
        assert re.search(rf'{listed}"{re.escape(paper["title"])}", .*?{paper["year"]} \(arXiv {number}\)', readme)
        assert paper["identifiers"] == [{"type": "other", "value": f"arXiv:{number}"}]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_an_issue_form_has_what_its_host_requires(path):
    form = read(path)
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    assert {field["type"] for field in fields} <= {"textarea", "input", "checkboxes", "dropdown"}
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


@pytest.fixture(scope="module")
def workflow():
    return read(".github/workflows/ci.yml")


def test_the_workflow_may_only_read(workflow):
    assert workflow["permissions"] == {"contents": "read"}
    assert not any("permissions" in job for job in workflow["jobs"].values())


def test_the_workflow_tests_every_python_from_the_oldest_on(workflow):
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    oldest = [job for job in matrix["include"] if job["versions"] == "oldest"]
    assert {job["python"] for job in oldest} == {"3.11"}
    assert [job["shard"] for job in oldest] == matrix["shard"]


def test_the_shards_of_the_workflow_are_all_test_files_once(workflow):
    shards = workflow["jobs"]["tests"]["strategy"]["matrix"]["shard"]
    listing = workflow["jobs"]["tests"]["steps"][-1]["run"].rpartition("| xargs")[0]
    files = []
    for shard in shards:
        ran = subprocess.run(
            ["bash", "-c", listing], cwd=ROOT, env={"SHARD": str(shard), "PATH": "/usr/bin:/bin"}, capture_output=True
        )
        files += ran.stdout.decode().split()
    tracked = subprocess.run(["git", "ls-files", "tests"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a clone")
    assert sorted(files) == sorted(path for path in tracked if re.fullmatch(r"(.*/)?test_[^/]*\.py", path))


def test_every_dependency_has_a_lower_bound():
    """CI tests these versions."""
    listed = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    assert [each for each in listed if ">=" not in each.partition(";")[0]] == []
