// Newest is etcd of a release that Debian does not have. It is a module of its own,
// so that nothing of a server reaches go.mod of the project.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
