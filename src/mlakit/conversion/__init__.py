"""From ordinary attention to latent attention: statistics, algebra, plan, and the run itself."""
