"""`python -m lead_ds COMMAND`, and so `deepspeed --module lead_ds distill x.yaml`."""

from lead_ds.cli import main

if __name__ == "__main__":
    main()
