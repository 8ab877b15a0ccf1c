"""What tests of every folder share: `import cuda_packages` finds the module beside this file."""
