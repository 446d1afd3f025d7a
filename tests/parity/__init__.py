"""Our numbers held against golden cases that were computed with the published implementations."""
