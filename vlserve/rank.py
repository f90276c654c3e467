"""The name that rank processes are started under and that people see in `ps`: `python -m vlserve.rank`."""

from vlserve.ranks.rank_process import main

if __name__ == "__main__":
    main()
