"""Dynamic-LLaVA (arXiv 2412.00876): trained predictors drop image and answer tokens."""
