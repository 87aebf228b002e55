package coordinator_test

func runAsChild() bool { return false }
