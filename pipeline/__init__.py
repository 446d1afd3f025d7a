"""The experiment as a Kubeflow pipeline: its graph, and the command line that compiles, submits and runs it."""
