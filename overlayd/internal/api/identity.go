package api

import "time"

// Paths of the coordinator about identity.
const (
	PathJoin         = "/v1/join"          // POST JoinRequest -> JoinResponse; nobody has to be known for it
	PathRenew        = "/v1/renew"         // POST RenewRequest -> JoinResponse
	PathTokens       = "/v1/tokens"        // GET []TokenInfo; POST TokenRequest -> TokenCreated
	PathTokensRevoke = "/v1/tokens/revoke" // POST TokenRevoke -> 204
	PathAgentsRevoke = "/v1/agents/revoke" // POST RevokeRequest -> 204
	PathCA           = "/v1/ca"            // GET []CA, the one that issues last
	PathCARotate     = "/v1/ca/rotate"     // POST RotateRequest -> []CA
	PathWhoami       = "/v1/whoami"        // GET Whoami
)

// Headers of every answer to somebody whose certificate was, or was not, accepted.
const (
	// HeaderBundle names the CAs that are trusted; when it changes, an agent
	// renews its certificate and learns which they are.
	HeaderBundle = "Overlay-Ca"
	// HeaderRefused says in one word why a certificate is not accepted.
	HeaderRefused = "Overlay-Identity-Refused"
)

// JoinRequest exchanges a token for a certificate.
type JoinRequest struct {
	Token string `json:"token"`
	Name  string `json:"name"` // agent id, or of a person
	CSR   string `json:"csr"`  // certificate request, PEM; only its key counts
}

// RenewRequest asks for another certificate of the identity that asks.
type RenewRequest struct {
	CSR string `json:"csr"`
}

// JoinResponse is a certificate and the CAs to trust, PEM.
type JoinResponse struct {
	Role        string `json:"role"`
	Name        string `json:"name"`
	Certificate string `json:"certificate"`
	CA          string `json:"ca"`
}

// TokenRequest asks for a token.
type TokenRequest struct {
	Role       string `json:"role"`
	TTLSeconds int64  `json:"ttl_seconds"`
	Uses       int    `json:"uses"`
	AgentID    string `json:"agent_id,omitempty"` // that alone may join with it, also if it has joined before
}

// TokenCreated is the only place where the token is.
type TokenCreated struct {
	Token   string    `json:"token"`
	ID      string    `json:"id"`
	Role    string    `json:"role"`
	Expires time.Time `json:"expires"`
}

// TokenInfo is a token without its secret.
type TokenInfo struct {
	ID      string    `json:"id"`
	Role    string    `json:"role"`
	AgentID string    `json:"agent_id,omitempty"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	Uses    int       `json:"uses"`
	Left    int       `json:"left"`
}

// TokenRevoke names a token by its id.
type TokenRevoke struct {
	ID string `json:"id"`
}

// RevokeRequest names agents whose certificates are refused from now on.
type RevokeRequest struct {
	Agents []string `json:"agents"`
}

// RotateRequest makes a new CA or, with Retire, ends the trust in all but the
// newest.
type RotateRequest struct {
	Retire bool `json:"retire,omitempty"`
}

// CA is one that is trusted.
type CA struct {
	Fingerprint string    `json:"fingerprint"`
	Subject     string    `json:"subject"`
	Issues      bool      `json:"issues"`
	NotAfter    time.Time `json:"not_after"`
	Until       time.Time `json:"until,omitzero"` // trusted until then
	Certificate string    `json:"certificate"`    // PEM
}

// Whoami is who the coordinator takes the asker for.
type Whoami struct {
	Role    string    `json:"role"`
	Name    string    `json:"name"`
	Expires time.Time `json:"expires,omitzero"` // of the certificate
}
