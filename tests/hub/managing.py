"""Endpoints of repos and accounts: who asks, create, delete, branches, and what a commit has."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, urlencode

import yaml

from tests.hub.asking import Answer, Asked, RefusedError
from tests.hub.blobs import git_oid, pointer
from tests.hub.repos import Commit, Entry, Written

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LICENSES = (
    "apache-2.0",
    "mit",
    "openrail",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "gpl-3.0",
    "llama3.1",
    "gemma",
    "unknown",
    "other",
)
"""Some of those that the Hub knows."""


def whoami(asked: Asked) -> Answer:
    """Answer with the account of the token."""
    who = asked.needs_account()
    orgs = [{"type": "org", "name": each, "roleInOrg": "write"} for each in who.orgs]
    token = {"displayName": "test", "role": who.role, "createdAt": "2026-01-01T00:00:00.000Z"}
    auth = {"type": "access_token", "accessToken": token}
    return Answer({"type": "user", "name": who.name, "fullname": who.name, "orgs": orgs, "auth": auth})


def may(asked: Asked) -> Answer:
    """Say whether the token may read the repo, or write into it."""
    if asked.path.get("write"):
        asked.repo_to_write()
    else:
        asked.repo()
    return Answer({})


def create(asked: Asked) -> Answer:
    """Create a repo with a first commit."""
    who, table = asked.needs_account(), asked.json()
    space = table.get("organization") or who.name
    name = f"{space}/{table['name']}"
    if not who.owns(name) or who.role != "write":
        raise RefusedError(403, f'You don\'t have the rights to create a model under the namespace "{space}"')
    url = f"{asked.hub.url}/{name}"
    if name in asked.hub.written or name in asked.hub.repos:
        return Answer({"error": "You already created this model repo", "url": url}, 409)
    new = Written(name, table.get("visibility") == "private" or bool(table.get("private")))
    entry = Entry(asked.hub.blobs.add(ATTRIBUTES), len(ATTRIBUTES), git_oid(ATTRIBUTES))
    new.commit("main", {".gitattributes": entry}, "initial commit", "", 1, who.name)
    asked.hub.written[name] = new
    asked.save(new)
    return Answer({"url": url, "name": name, "id": name})


def delete(asked: Asked) -> Answer:
    """Delete a repo."""
    table = asked.json()
    asked.path = {"repo": f"{table.get('organization') or asked.needs_account().name}/{table['name']}"}
    repo = asked.repo_to_write()
    del asked.hub.written[repo.name]
    Written.file(asked.hub.folder, repo.name).unlink()
    return Answer({})


def settings(asked: Asked) -> Answer:
    """Make a repo private or public."""
    repo = asked.repo_to_write()
    repo.private = asked.json().get("visibility") == "private"
    asked.save(repo)
    return Answer({"private": repo.private})


def validate(asked: Asked) -> Answer:
    """Check the front matter of a model card: its license, and the ids of its bases."""
    found = re.match(r"---[\r\n]+(.*?)[\r\n]+---[\r\n]?", asked.json()["content"], re.DOTALL)
    if found is None:
        return Answer(
            {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        )
    table, errors = yaml.safe_load(found[1]) or {}, []
    if "license" in table and table["license"] not in LICENSES:
        errors.append(f'"license" must be one of [{", ".join((*LICENSES, "array"))}]')
    bases = table.get("base_model", [])
    errors.extend(
        f'"base_model" with value "{each}" is not valid. Use a model id from https://hf.co/models.'
        for each in ([bases] if isinstance(bases, str) else bases)
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", each)
    )
    return Answer({"errors": [{"message": each} for each in errors], "warnings": []}, 400 if errors else 200)


def branch(asked: Asked) -> Answer:
    """Create a branch at another, or at a commit."""
    repo, name = asked.repo_to_write(), asked.path["branch"]
    if name in repo.refs:
        raise RefusedError(409, f"Reference already exists: refs/heads/{name}")
    asked.path = {**asked.path, "revision": asked.json().get("startingPoint", "main")}
    repo.refs[name] = asked.commit(repo).oid
    asked.save(repo)
    return Answer({})


def unbranch(asked: Asked) -> Answer:
    """Delete a branch."""
    repo, name = asked.repo_to_write(), asked.path["branch"]
    if name not in repo.refs or name == "main":
        raise RefusedError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    del repo.refs[name]
    asked.save(repo)
    return Answer({})


def refs(asked: Asked) -> Answer:
    """List branches, and pull requests where they are asked for."""
    repo = asked.repo()
    table: dict[str, Any] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for name, oid in repo.refs.items():
        is_pull = name.startswith("refs/pr/")
        row = {"name": name.split("/")[-1] if is_pull else name, "targetCommit": oid}
        table["pullRequests" if is_pull else "branches"].append(
            row | {"ref": name if is_pull else f"refs/heads/{name}"}
        )
    return Answer(table)


def commits(asked: Asked) -> Answer:
    """List the commits of a branch, the newest first."""
    repo = asked.repo()
    at: Commit | None = asked.commit(repo)
    rows = []
    while at:
        row = {"id": at.oid, "title": at.title, "message": at.message, "date": at.date}
        rows.append(row | {"authors": [{"user": at.author}]})
        at = repo.commits.get(at.parent)
    return Answer(rows)


def info(asked: Asked) -> Answer:
    """Describe a repo at a commit."""
    repo = asked.repo()
    found = asked.commit(repo)
    has_sizes = "blobs" in asked.query
    siblings = [
        {"rfilename": name} | (_sizes(entry) if has_sizes else {}) for name, entry in found.files.items()
    ]
    table = {"id": repo.name, "modelId": repo.name, "author": repo.name.split("/")[0], "sha": found.oid}
    more = {"private": repo.private, "tags": [], "downloads": 0, "likes": 0, "lastModified": found.date}
    return Answer(table | more | {"siblings": siblings})


def tree(asked: Asked) -> Answer:
    """List the files of a commit, a page at a time: all, or those of one folder and the folders in it."""
    commit = asked.commit(asked.repo())
    inside = asked.path.get("inside", "")
    prefix = f"{inside}/" if inside else ""
    rows: dict[str, dict[str, Any]] = {}
    for name, entry in sorted(commit.files.items()):
        if not name.startswith(prefix):
            continue
        for folder in reversed(PurePosixPath(name).parents[:-1]):
            if folder.as_posix().startswith(prefix) and folder.as_posix() != inside:
                rows[folder.as_posix()] = {
                    "type": "directory",
                    "path": folder.as_posix(),
                    "oid": "0" * 40,
                    "size": 0,
                }
        rows[name] = {"type": "file", "path": name} | _described(entry)
    if asked.query.get("recursive", "").lower() != "true":
        rows = {name: row for name, row in rows.items() if "/" not in name.removeprefix(prefix)}
    if prefix and not rows:
        raise RefusedError(404, f"{inside} does not exist", "EntryNotFound")
    start, page = int(asked.query.get("cursor", 0)), asked.hub.page
    headers = {}
    if start + page < len(rows):
        query = urlencode({**asked.query, "cursor": start + page})
        address = (
            f"{asked.hub.url}/api/models/{asked.path['repo']}/tree/{quote(asked.path['revision'], safe='')}"
        )
        headers["Link"] = f'<{address}{"/" + quote(inside, safe="") if inside else ""}?{query}>; rel="next"'
    return Answer(list(rows.values())[start : start + page], headers=headers)


def paths_info(asked: Asked) -> Answer:
    """Describe the files that are named; those that are not there are left out."""
    files, wanted = asked.commit(asked.repo()).files, asked.form()["paths"]
    return Answer(
        [{"type": "file", "path": each} | _described(files[each]) for each in wanted if each in files]
    )


def resolve(asked: Asked) -> Answer:
    """Send a file, or say what it is."""
    repo = asked.repo()
    found, name = asked.commit(repo), asked.path["file"]
    stated = {"X-Repo-Commit": found.oid}
    entry = found.files.get(name)
    if entry is None:
        return Answer({"error": "Entry not found"}, 404, stated | {"X-Error-Code": "EntryNotFound"})
    stated["ETag"] = f'"{entry.sha256 if entry.lfs else entry.oid}"'
    if entry.lfs:
        stated |= {"X-Linked-ETag": stated["ETag"], "X-Linked-Size": str(entry.size)}
    if entry.xet:
        token = f"{asked.hub.url}/api/models/{repo.name}/xet-read-token/{found.oid}"
        stated |= {
            "X-Xet-Hash": entry.xet,
            "X-Xet-Refresh-Route": token,
            "Link": f'<{token}>; rel="xet-auth"',
        }
    return Answer(None, 200, stated, asked.hub.blobs.path(entry.sha256), PurePosixPath(name).name)


def _described(entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {"size": entry.size, "oid": entry.oid}
    if entry.lfs:
        size = len(pointer(entry.sha256, entry.size))
        row["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": size}
    return row | ({"xetHash": entry.xet} if entry.xet else {})


def _sizes(entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {"size": entry.size, "blobId": entry.oid}
    if entry.lfs:
        row["lfs"] = {
            "sha256": entry.sha256,
            "size": entry.size,
            "pointerSize": len(pointer(entry.sha256, entry.size)),
        }
    return row
