package agent

import "time"

// timing is how long things take. Tests in this package shorten it.
type timing struct {
	renew        time.Duration // between renewals; jitter is added
	findIP       time.Duration // how long finding the agent IP may take
	firstIP      time.Duration // the same at the start, when the datapath waits for it
	backoffMin   time.Duration // of registrations and watches that fail
	backoffMax   time.Duration
	backlog      time.Duration // how long what was missed takes to come once it does
	kernel       time.Duration // changes in the kernel that come so close together are one
	kernelPause  time.Duration // between two repairs in the long run, so that we fight nobody at full speed
	resync       time.Duration // between two looks at the whole kernel state
	retryMin     time.Duration // of a configuration that failed
	drain        time.Duration // between two looks at whether the containers of a withdrawn subnet have gone
	otherCluster time.Duration // between two tries at coordinators of another cluster
	home         time.Duration // between two looks at whether our own coordinator is there again
	savePeers    time.Duration // between two writes of the peers
	tidy         time.Duration // from the start, or from a write of the peers, to giving back memory
	sweep        time.Duration // between two looks for abandoned addresses
	socket       time.Duration // between two looks at whether our socket is there
	follow       time.Duration // after which a host that does not follow its peers says so
	files        time.Duration // between two looks at the files of the runtimes and the document
	coalesce     time.Duration // changes of the document that come so close together are one
	lookPause    time.Duration // least time between two looks at it because of changes
	examineFirst time.Duration // from the start to doctor's first look
	examine      time.Duration // between two looks of doctor at a host with which nothing is wrong
	examineAgain time.Duration // between two at another
	report       time.Duration // least time between two reports of what is attached
	reportMost   time.Duration // longest time that nothing is looked at for one
	direct       time.Duration // how long peers may go on sending without VXLAN after they were told to stop
	room         time.Duration // between two looks at how full the halves are
	roomPause    time.Duration // least time between two looks at it because of changes
	survey       time.Duration // between two looks for operators
	abandoned    time.Duration // how long a container must be gone before its addresses are released
}

// repairsAtOnce is how many repairs may follow each other without that pause.
const repairsAtOnce = 5

var defaultTiming = timing{
	renew:        30 * time.Second,
	findIP:       5 * time.Second,
	firstIP:      500 * time.Millisecond,
	backoffMin:   200 * time.Millisecond,
	backoffMax:   15 * time.Second,
	backlog:      20 * time.Millisecond,
	kernel:       100 * time.Millisecond,
	kernelPause:  time.Second,
	resync:       time.Minute,
	drain:        2 * time.Second,
	retryMin:     500 * time.Millisecond,
	otherCluster: 5 * time.Second,
	home:         30 * time.Second,
	savePeers:    2 * time.Second,
	tidy:         10 * time.Second,
	sweep:        30 * time.Second,
	socket:       2 * time.Second,
	follow:       5 * time.Second,
	files:        10 * time.Second,
	coalesce:     200 * time.Millisecond,
	lookPause:    500 * time.Millisecond,
	examineFirst: 2 * time.Minute,
	examine:      10 * time.Minute,
	examineAgain: time.Minute,
	report:       250 * time.Millisecond,
	reportMost:   time.Second,
	direct:       time.Minute,
	room:         10 * time.Second,
	roomPause:    100 * time.Millisecond,
	survey:       time.Second,
	abandoned:    time.Minute,
}
