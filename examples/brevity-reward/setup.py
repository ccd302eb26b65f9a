from setuptools import setup

setup(
    name="brevity-reward",
    version="0.1.0",
    description="An example of a reward plugin in a package of its own",
    py_modules=["brevity_reward"],
    install_requires=["rlhf-engine"],
    entry_points={"rlhf_engine": ["brevity = brevity_reward:Brevity"]},  # the name that run files use
)
