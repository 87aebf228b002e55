// Package page tests the page of the coordinator in a real browser, Debian's
// Chromium without a window: what it shows, how fast, whether it can be used
// without a mouse and by a screen reader, and that what somebody calls his
// container stays text. It takes the pictures of the documents, too.
package page
