"""The decorator of every component: runs in the image as it is, installs nothing when a pod starts.

Without VITDET_IMAGE the pipeline sets the image of the training job instead. Not in
`components/__init__.py`, which the steps import: in a pod kfp has no decorators.
"""

from functools import partial

from kfp import dsl

from components import IMAGE

component = partial(
    dsl.component, base_image=IMAGE or "python", install_kfp_package=False, packages_to_install=[]
)
