"""Endpoints that bring files into a repo: what to do with each, LFS in one piece or in parts, tokens of xet, and commits."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Iterable
from typing import Any

from tests.hub import asking
from tests.hub.asking import Answer, Asked, RefusedError
from tests.hub.blobs import git_oid, pointer
from tests.hub.repos import Entry, Written

LARGE = 10_000_000
BINARY = (".safetensors", ".bin", ".pt", ".gguf", ".onnx", ".parquet", ".tar", ".zip")
SECONDS_OF_A_TOKEN = 3600


def preupload(asked: Asked) -> Answer:
    """Say for each file whether it belongs into LFS, and what the branch has under its name."""
    repo = asked.repo_to_write(is_pull=bool(asked.query.get("create_pr")))
    files, rows = asked.commit(repo).files, []
    for each in asked.json()["files"]:
        path, sample = each["path"], base64.b64decode(each.get("sample", ""))
        is_large = path.endswith(BINARY) or each["size"] > LARGE or b"\0" in sample
        there = files.get(path)
        rows.append(
            {
                "path": path,
                "uploadMode": "lfs" if is_large else "regular",
                "shouldIgnore": False,
                "oid": (there.sha256 if there.lfs else there.oid) if there else None,
            }
        )
    return Answer({"files": rows})


def batch(asked: Asked) -> Answer:
    """Say where each file goes; one that this repo has goes nowhere."""
    repo = asked.repo_to_write(is_pull=True)
    wanted = asked.json()["objects"]
    _refuse_full(asked, repo, sum(each["size"] for each in wanted if each["oid"] not in repo.uploaded))
    return Answer({"transfer": "basic", "objects": [_actions(asked, repo, each) for each in wanted]})


def _actions(asked: Asked, repo: Written, each: dict[str, Any]) -> dict[str, Any]:
    row = {"oid": each["oid"], "size": each["size"]}
    if each["oid"] in repo.uploaded:
        return row
    address, part_size = f"{asked.hub.url}/_lfs/{repo.name}/{each['oid']}", asked.hub.part_size
    upload: dict[str, Any] = {"href": address, "header": {}}
    if part_size and each["size"] > part_size:
        numbers = range(1, math.ceil(each["size"] / part_size) + 1)
        parts = {str(number): f"{address}/part/{number}" for number in numbers}
        upload = {"href": f"{address}/complete", "header": {"chunk_size": str(part_size), **parts}}
    return row | {"actions": {"upload": upload, "verify": {"href": f"{address}/verify", "header": {}}}}


def put(asked: Asked) -> Answer:
    """Take a file, or a part of one: the address is the permission."""
    part = asked.path.get("part")
    name = f"{asked.path['oid']}.{part}" if part else asked.path["oid"]
    return Answer({}, headers={"ETag": f'"{asked.hub.blobs.receive(name, asked.pieces)}"'})


def complete(asked: Asked) -> Answer:
    """Put the parts of a file together."""
    asked.hub.blobs.join(asked.path["oid"], len(asked.json()["parts"]))
    return Answer({"success": True})


def verify(asked: Asked) -> Answer:
    """Say whether what arrived has the SHA-256 and the size that were announced."""
    repo, table = asked.repo_to_write(is_pull=True), asked.json()
    if not asked.hub.blobs.verify(table["oid"], table["size"]):
        raise RefusedError(422, f"The file that arrived is not {table['oid']}")
    repo.uploaded.add(table["oid"])
    asked.save(repo)
    return Answer({})


def xet_token(asked: Asked) -> Answer:
    """Name the store of xet: the real one to a writer, a copy to a reader; each process locks the one that it opens."""
    if asked.path["kind"] == "write":
        _refuse_full(asked, asked.repo_to_write(is_pull=True), 0)
        store = asked.hub.blobs.cas
        expires = int(time.time()) + SECONDS_OF_A_TOKEN
    else:
        asked.repo()
        store = asked.hub.blobs.snapshot()
        expires = int(time.time()) + 1  # a copy ages: the next reader asks again
    url = f"local://{store}"
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
    return Answer({"casUrl": url, "accessToken": "xet", "exp": expires}, headers=headers)


def duplicate(asked: Asked) -> Answer:
    """Give files of one repo to another, where no byte has to move."""
    source, table = asked.repo(), asked.json()
    asked.path = {**asked.path, "repo": table["target"]["name"]}
    target = asked.repo_to_write()
    have = source.uploaded | {
        entry.sha256 for each in source.commits.values() for entry in each.files.values()
    }
    failed = [{**each, "error": "not found"} for each in table["files"] if each["sha256"] not in have]
    target.uploaded |= {each["sha256"] for each in table["files"]} & have
    asked.save(target)
    return Answer({"success": [], "failed": failed})


def commit(asked: Asked) -> Answer:
    """Make a commit on a branch, or on a new pull request."""
    makes_pull = bool(asked.query.get("create_pr"))
    ref = asked.path["revision"]
    repo = asked.repo_to_write(is_pull=makes_pull or ref.startswith("refs/pr/"))
    who, rows = asked.needs_account(), [json.loads(line) for line in asked.body().splitlines() if line]
    header, operations = rows[0]["value"], rows[1:]
    parent = asked.commit(repo)
    wanted = header.get("parentCommit")
    if makes_pull and wanted:
        asked.path = {**asked.path, "revision": wanted}
        parent = asked.commit(repo)
    elif wanted and not parent.oid.startswith(wanted):
        raise RefusedError(412, asking.CONFLICT)
    _refuse_merged(repo, ref)
    _refuse_full(asked, repo, 0, status=400)
    files = _applied(asked, repo, dict(parent.files), operations)
    answer = {"success": True, "hookOutput": ""}
    if makes_pull:
        pull = repo.discuss(header["summary"], who.name, "open", base=parent.oid, target=ref)
        pull.comment(who.name, header.get("description", ""))
        answer["pullRequestUrl"] = f"{asked.hub.url}/{repo.name}/discussions/{pull.num}"
        ref = pull.ref
    made = repo.commit(
        ref, files, header["summary"], header.get("description", ""), len(operations), who.name
    )
    for each in repo.discussions:
        if each.ref == ref:
            each.tell("commit", who.name, {"subject": made.title, "oid": made.oid})
    asked.save(repo)
    return Answer(
        answer | {"commitOid": made.oid, "commitUrl": f"{asked.hub.url}/{repo.name}/commit/{made.oid}"}
    )


def _applied(
    asked: Asked, repo: Written, files: dict[str, Entry], operations: Iterable[dict[str, Any]]
) -> dict[str, Entry]:
    """Return the files of a branch after the operations of a commit."""
    for operation in operations:
        kind, value = operation["key"], operation["value"]
        path = value["path"].rstrip("/")
        if kind == "file":
            content = base64.b64decode(value["content"])
            files[path] = Entry(asked.hub.blobs.add(content), len(content), git_oid(content))
        elif kind == "lfsFile":
            files[path] = _in_lfs(asked, repo, path, value["oid"])
        elif kind == "copyFile":
            source = repo.find(value.get("srcRevision") or asked.path["revision"])
            if source is None or value["srcPath"] not in source.files:
                raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
            files[path] = source.files[value["srcPath"]]
        else:
            gone = [
                name
                for name in files
                if name == path or (kind == "deletedFolder" and name.startswith(f"{path}/"))
            ]
            if not gone:
                raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]
    return files


def _in_lfs(asked: Asked, repo: Written, path: str, sha256: str) -> Entry:
    """Return the entry of a file that was uploaded before; refuse one that was not."""
    xet = ""
    if sha256 in repo.uploaded:
        known = (each.files.get(path) for each in repo.commits.values())
        xet = next((entry.xet for entry in known if entry and entry.sha256 == sha256), "")
    elif not (xet := asked.hub.blobs.from_xet(sha256) or ""):
        raise RefusedError(400, asking.NO_POINTER.format(path))
    repo.uploaded.add(sha256)
    size = asked.hub.blobs.path(sha256).stat().st_size
    return Entry(sha256, size, git_oid(pointer(sha256, size)), lfs=True, xet=xet)


def _refuse_merged(repo: Written, ref: str) -> None:
    """Refuse a commit on a pull request that is closed or merged."""
    for each in repo.discussions:
        if each.ref == ref and each.is_pull_request and each.status in {"closed", "merged"}:
            raise RefusedError(403, f"The pull request is {each.status}")


def _refuse_full(asked: Asked, repo: Written, size: int, *, status: int = 403) -> None:
    """Refuse what private repos have no room for."""
    quota = asked.hub.quota
    if quota is not None and repo.private and asked.hub.stored() + size > quota:
        raise RefusedError(status, asking.FULL)
