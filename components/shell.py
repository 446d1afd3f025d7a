"""The decorator of every component: in the one image, where nothing is installed when a pod starts. Without a name for
it here, the pipeline gives the tasks that of the training job.

Apart from `components` itself, which the steps import too: in a pod kfp has no decorators.
"""

from functools import partial

from kfp import dsl

from components import IMAGE

component = partial(
    dsl.component, base_image=IMAGE or "python", install_kfp_package=False, packages_to_install=[]
)
