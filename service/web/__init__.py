"""The pages: templates, styles and scripts. They ship in the package and load nothing else."""
