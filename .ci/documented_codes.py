"""Checks that the document names each error code for the operation that answered it: documented_codes.py DOCUMENT REPORT…

The reports are those of schemathesis in NDJSON. It checks statuses and schemas itself, but not the codes of problems.
"""

import base64
import json
import re
import sys
from typing import Any, Iterator


def interactions(report: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The requests of a report with their responses."""
    with open(report) as lines:
        for line in lines:
            recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
            for interaction in recorder.get("interactions", {}).values():
                if interaction["response"]:
                    yield interaction["request"], interaction["response"]


def documented(document: dict[str, Any]) -> list[tuple[str, re.Pattern[str], str, set[tuple[str, str]]]]:
    """For each operation: its method, a pattern for its path, its id, and its pairs of status and code."""
    found = []
    for path, item in document["paths"].items():
        pattern = re.compile(re.sub(r"\\?\{\w+\\?\}", "[^/]*", re.escape(path)) + "$")
        for method, operation in item.items():
            responses = operation["responses"].items()
            codes = {(status, code) for status, response in responses for code in re.findall("`([a-z-]+)`", response["description"])}
            found.append((method.upper(), pattern, operation["operationId"], codes))
    return found


with open(sys.argv[1]) as file:
    operations = documented(json.load(file))
checked = 0
missing = set()
for request, response in (pair for report in sys.argv[2:] for pair in interactions(report)):
    if response["headers"].get("content-type") != ["application/problem+json"]:
        continue
    problem = json.loads(base64.b64decode(response["content"]["$base64"]))
    path = re.sub("^[^/]*//[^/]*|[?].*$", "", request["uri"])
    for method, pattern, operation, codes in operations:
        if method == request["method"] and pattern.match(path):
            checked += 1
            if not {(str(problem["status"]), problem["code"]), ("4XX", problem["code"])} & codes:
                missing.add((operation, problem["status"], problem["code"]))
for operation, status, code in sorted(missing):
    print(f"the document does not name {status} {code} for {operation}")
if missing or checked < 500:
    sys.exit(f"{checked} problems were compared with the document (at least 500 expected), {len(missing)} codes are missing")
print(f"{checked} problems have codes that the document names for their operations")
