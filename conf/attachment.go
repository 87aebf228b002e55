package conf

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"strings"
)

// Attachment is CNI's key of an address: one interface of one container in one
// network.
type Attachment struct {
	Network     string `json:"network"`
	ContainerID string `json:"container_id"`
	IfName      string `json:"ifname"`
}

// Key is a short, fixed-size stand-in for an attachment.
type Key [16]byte

// String is the key in lower case hex, 32 digits.
func (k Key) String() string { return hex.EncodeToString(k[:]) }

// Key is the first half of the sha256 of the three names, each behind its
// length, so that no two attachments share a text.
func (a Attachment) Key() Key {
	b := make([]byte, 0, 128)
	for _, s := range [...]string{a.Network, a.ContainerID, a.IfName} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
		b = append(b, s...)
	}
	sum := sha256.Sum256(b)
	return Key(sum[:16])
}

// String is network/container/interface, for messages.
func (a Attachment) String() string {
	if a.IsDocker() {
		return "a container of Docker"
	}
	return a.Network + "/" + a.ContainerID + "/" + a.IfName
}

// dockerNetwork starts the network name of Docker's attachments. No CNI network
// can have such a name, because of the slash.
const dockerNetwork = "docker/"

// DockerAttachment is the attachment under which an address of Docker's is
// stored.
func DockerAttachment(overlay string, a netip.Addr) Attachment {
	return Attachment{Network: dockerNetwork + overlay, ContainerID: a.String(), IfName: "docker"}
}

// IsDocker reports whether the attachment is one of Docker's. It has no link of
// ours: Docker makes its own, and the agent asks Docker what is in use.
func (a Attachment) IsDocker() bool { return strings.HasPrefix(a.Network, dockerNetwork) }
