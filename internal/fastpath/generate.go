package fastpath

// After a change of the sources, with clang and llvm installed:
//
//	go generate ./internal/fastpath && UPDATE_OBJECTS=1 go test ./internal/fastpath -run Objects

//go:generate go tool bpf2go -target bpfel,bpfeb -type host -type overlay -type traffic -type prefix4 -type prefix6 -type peer -type attachment programs bpf/fastpath.c -- -O2 -mcpu=v3 -Wall -Werror
