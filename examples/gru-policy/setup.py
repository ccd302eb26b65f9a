from setuptools import setup

setup(
    name="gru-policy",
    version="0.1.0",
    description="An example of a policy plugin in a package of its own: a GRU over bytes",
    py_modules=["gru_policy"],
    install_requires=["rlhf-engine"],
    entry_points={"rlhf_engine": ["gru_policy = gru_policy:GRUPolicy"]},  # the name that run files use
)
