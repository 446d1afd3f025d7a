"""The training job of a pipeline step: create it, follow it to its end, report why it failed.

`launch` starts a job and follows it, `client` sends the requests to the Kubernetes API, `templates`
fills in the two kinds of job, `status` interprets what the API server reports of jobs, pods and
events, `follower` waits for the end.
"""
