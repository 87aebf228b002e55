package report

import "testing"

// What is secret goes, in the forms that files, logs and documents have it in; what
// stands beside it stays.
func TestScrub(t *testing.T) {
	const pem = "-----BEGIN CERTIFICATE-----\nhunter2\n-----END CERTIFICATE-----"
	for text, want := range map[string]string{
		// What other plugins leave among the CNI files.
		"    client-key-data: LS0tLS1CRUdJTg==":         `    client-key-data: "[removed]"`,
		"    client-certificate-data: LS0tLS1CRUdJTg==": `    client-certificate-data: "[removed]"`,
		`"etcd_key": "LS0t", "etcd_key_file": "/x"`:     `"etcd_key": "[removed]", "etcd_key_file": "/x"`,
		"x " + pem + " y": "x [removed] y",
		// Names with more behind what they say, texts with quotes in them.
		"aws_secret_access_key = hunter2":               `aws_secret_access_key = "[removed]"`,
		`"secretKey":"hunter2", "keep": 1`:              `"secretKey":"[removed]", "keep": 1`,
		`"password": "ab\"hunter2", "keep": 1`:          `"password": "[removed]", "keep": 1`,
		`password='it''s hunter2' keep`:                 `password="[removed]" keep`,
		`{"line":"{\"token\":\"hunter2\",\"keep\":1}"}`: `{"line":"{\"token\":\"[removed]\",\"keep\":1}"}`,
		// Several of them, and in several lines.
		"\"tokens\": [\n  \"hunter2\",\n  \"hunter3\"\n],\n\"keep\": 1":            "\"tokens\": \"[removed]\",\n\"keep\": 1",
		`"credentials": {"user": "a", "pw": "hunter2"}, "keep": 1`:                 `"credentials": "[removed]", "keep": 1`,
		"a:\n  token: |-\n    hunter2\n\n    hunter3\nkeep: 1\n":                   "a:\n  token: \"[removed]\"\nkeep: 1\n",
		"passphrase: two words\nkeep: 1\n":                                         "passphrase: \"[removed]\"\nkeep: 1\n",
		"psk=hunter2\nnet.ipv4.tcp_fastopen_key = 1a-2b\nnet.ipv4.tcp_ecn = 2\n":   "psk=\"[removed]\"\nnet.ipv4.tcp_fastopen_key = \"[removed]\"\nnet.ipv4.tcp_ecn = 2\n",
		"exec --etcd-password hunter2 --keep 1":                                    "exec --etcd-password [removed] --keep 1",
		"GET https://hunter2@example.org/x with Bearer hunter2hunter2 was refused": "GET https://[removed]@example.org/x with Bearer [removed] was refused",
		// Where one lies is no secret, nor is talk of one.
		"join-token-file: /etc/overlay/join-token":                              "join-token-file: /etc/overlay/join-token",
		`err="--join-token-file: open /etc/x: no such file"`:                    `err="--join-token-file: open /etc/x: no such file"`,
		`coordinators: ["https://10.0.0.1:6440", "a@b"]`:                        `coordinators: ["https://10.0.0.1:6440", "a@b"]`,
		"join with a token: overlayd agent, see overlayctl token create --uses": "join with a token: \"[removed]\" agent, see overlayctl token create --uses",
	} {
		if got := string(newScrubber().scrub([]byte(text))); got != want {
			t.Errorf("%s\nbecomes\n%s\nwant\n%s", text, got, want)
		}
	}
}
