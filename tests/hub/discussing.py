"""Endpoints of discussions and pull requests: list, details, comments, status, title, merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.hub.asking import Answer, Asked, RefusedError

if TYPE_CHECKING:
    from tests.hub.repos import Discussion, Written

PAGE = 50


def listed(asked: Asked) -> Answer:
    """Answer with a page of discussions, the newest first; by author, by type and by status."""
    repo, query = asked.repo(), asked.query
    found = [each for each in reversed(repo.discussions) if _is_wanted(each, query)]
    start = int(query.get("p", 0)) * PAGE
    page = [_summary(repo, each) for each in found[start : start + PAGE]]
    return Answer({"discussions": page, "count": len(found), "start": start})


def opened(asked: Asked) -> Answer:
    """Open a discussion, or a pull request without commits: that one is a draft."""
    repo, who, table = asked.repo_to_write(is_pull=True), asked.needs_account(), asked.json()
    is_pull = bool(table.get("pullRequest"))
    base = repo.refs["main"] if is_pull else ""
    new = repo.discuss(table["title"], who.name, "draft" if is_pull else "open", base=base)
    new.comment(who.name, table.get("description", ""))
    asked.save(repo)
    return Answer({"num": new.num, "pullRequest": is_pull})


def details(asked: Asked) -> Answer:
    """Answer with a discussion and all its events."""
    repo = asked.repo()
    found = asked.discussion(repo)
    table = _summary(repo, found) | {"events": found.events}
    if found.is_pull_request:
        changes: dict[str, Any] = {"base": found.target}
        if found.merged:
            changes["mergeCommitId"] = found.merged
        is_open = found.status in {"open", "draft"}
        table |= {
            "changes": changes,
            "filesWithConflicts": repo.conflicts(found) if is_open else [],
            "diff": "",
        }
    return Answer(table)


def commented(asked: Asked) -> Answer:
    """Add a comment."""
    repo = asked.repo_to_write(is_pull=True)
    event = asked.discussion(repo).comment(asked.needs_account().name, asked.json()["comment"])
    asked.save(repo)
    return Answer({"newMessage": event})


def renamed(asked: Asked) -> Answer:
    """Change the title."""
    repo = asked.repo_to_write()
    found, title = asked.discussion(repo), asked.json()["title"]
    event = found.tell("title-change", asked.needs_account().name, {"from": found.title, "to": title})
    found.title = title
    asked.save(repo)
    return Answer({"newTitle": event})


def turned(asked: Asked) -> Answer:
    """Close or open again; one that was merged stays so."""
    repo, who, table = asked.repo_to_write(), asked.needs_account(), asked.json()
    found = asked.discussion(repo)
    if found.status == "merged":
        raise RefusedError(400, "This pull request was merged already")
    if table.get("comment"):
        found.comment(who.name, table["comment"])
    event = found.turn(who.name, table["status"])
    asked.save(repo)
    return Answer({"newStatus": event})


def merged(asked: Asked) -> Answer:
    """Merge a pull request that is open, where its target has not changed the same files."""
    repo, who = asked.repo_to_write(), asked.needs_account()
    found, table = asked.discussion(repo), asked.json()
    if not found.is_pull_request or found.status != "open":
        raise RefusedError(400, f"Cannot merge: the status is {found.status}")
    if files := repo.conflicts(found):
        raise RefusedError(409, f"Cannot merge: files with conflicts: {', '.join(files)}")
    if table.get("comment"):
        found.comment(who.name, table["comment"])
    repo.merge(found, who.name)
    asked.save(repo)
    return Answer({"newStatus": found.events[-1]})


def _is_wanted(each: Discussion, query: Any) -> bool:
    kind = {"pull_request": each.is_pull_request, "discussion": not each.is_pull_request}
    state = {"open": each.status in {"open", "draft"}, "closed": each.status in {"closed", "merged"}}
    return (
        query.get("author", each.author) == each.author
        and kind.get(query.get("type", "all"), True)
        and state.get(query.get("status", "all"), True)
    )


def _summary(repo: Written, each: Discussion) -> dict[str, Any]:
    return {
        "num": each.num,
        "title": each.title,
        "status": each.status,
        "isPullRequest": each.is_pull_request,
        "author": {"name": each.author},
        "createdAt": each.created,
        "repo": {"type": "model", "name": repo.name},
    }
