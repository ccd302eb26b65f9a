from rlhf_engine.cli import main

main()
