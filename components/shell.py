"""The decorator of every component: the one image, in which nothing is installed when a pod starts.

Apart from `components` itself, which the steps import too: in a pod kfp has no decorators.
"""

from functools import partial

from kfp import dsl

from components import IMAGE

component = partial(dsl.component, base_image=IMAGE, install_kfp_package=False, packages_to_install=[])
