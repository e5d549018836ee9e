"""The commands of python -m minisaobp, one file each: its options (`add`) and what it does (`run`)."""
