"""Scripts that are run by hand and write the committed tables in results/."""
