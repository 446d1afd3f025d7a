"""The decorator of all components, which makes KFP install no packages when a pod starts.

If VITDET_IMAGE is not set, the pipeline runs the steps in the training job's image. The decorator
is not in `components/__init__.py` because the steps import that package in pods, where kfp provides
no decorators.
"""

from functools import partial

from kfp import dsl

from components import IMAGE

component = partial(
    dsl.component, base_image=IMAGE or "python", install_kfp_package=False, packages_to_install=[]
)
