"""Experiments as a Kubeflow pipeline: `python -m pipeline compile|run|submit|status|terminate`.

`graph` builds the pipeline, `local` runs it on this machine, `client` and `connection` communicate
with Kubeflow Pipelines, `cli` has one file per command.
"""
