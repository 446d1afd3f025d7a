"""The experiment as a Kubeflow pipeline: `python -m pipeline compile|run|submit|status|terminate`.

`graph` is the pipeline, `local` runs it on this machine, `client` and `connection` talk to Kubeflow
Pipelines, `cli` has one file per command.
"""
