"""The training job of a pipeline step: create it, follow it to its end, report why it failed.

`launch` starts a job and follows it, `client` sends the requests to the Kubernetes API, `errors`
describes rejected requests, `templates` fills in the templates of the two kinds of job, `pruned`
finds fields that the cluster does not support, `status` interprets what the API server reports,
`queue` interprets Kueue's Workloads, `follower` waits for the end, `failures` explains failures.
"""
