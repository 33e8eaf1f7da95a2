// A business and a device in one program: produce pushes to Kafka, receive and acknowledge them.
//
//	go mod download
//	go run . --user alice --token "$(barid token --user alice)"
//
// It uses no code of Barid: the records and frames below follow docs/protocol.md.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/gorilla/websocket"
	"github.com/segmentio/kafka-go"
)

var (
	brokers = flag.String("brokers", "127.0.0.1:9092", "Kafka, `host:port`")
	url     = flag.String("url", "ws://127.0.0.1:7080/v1/connect", "an access node")
	token   = flag.String("token", "", "a token from `barid token`")
	topic   = flag.String("topic", "barid.push", "")
	app     = flag.String("app", "demo", "")
	user    = flag.String("user", "alice", "")
	device  = flag.String("device", "go", "")
)

// A record for Kafka.
type push struct {
	ID         string          `json:"id"`
	App        string          `json:"app"`
	To         recipient       `json:"to"`
	Text       string          `json:"text,omitempty"`
	JSON       json.RawMessage `json:"json,omitempty"`
	Data       []byte          `json:"data,omitempty"` // base64 in JSON
	TTLSeconds int             `json:"ttlSeconds,omitempty"`
}

type recipient struct {
	User string `json:"user"`
}

// A frame is an object with one key, its kind; kinds that a client does not know are ignored.
type serverFrame struct {
	Welcome *struct{ Positions []position }
	Deliver *deliver
	Skip    *struct{ To uint64 }
	Error   *struct {
		Code int
		Text string
	}
}

type position struct {
	Mailbox string // empty: the user's own
	Seq     uint64
}

type deliver struct {
	Mailbox    string // empty: the user's own
	Generation uint32
	Messages   []struct {
		Seq  uint64
		ID   string
		Text *string
		JSON json.RawMessage
		Data *string // base64
	}
}

type hello struct {
	Device string `json:"device"`
}

type ack struct {
	Seq        uint64 `json:"seq"`
	Generation uint32 `json:"generation"`
}

// records returns three messages, one for each kind of body.
func records(app, user string) []push {
	now := time.Now().UnixNano()
	to := recipient{user}
	return []push{
		{ID: fmt.Sprint("greeting-", now), App: app, To: to, Text: "hello"},
		{ID: fmt.Sprint("order-", now), App: app, To: to, JSON: json.RawMessage(`{"order":7,"total":"12.50"}`)},
		{ID: fmt.Sprint("bytes-", now), App: app, To: to, Data: []byte{0, 1, 2, 3}, TTLSeconds: 3600},
	}
}

// produce acts as the business. The user as the Kafka key keeps the order of a user's messages. A retry may
// produce a record twice: Barid drops the second one, which has the same id.
func produce(brokers, topic, user string, pushes []push) error {
	producer := kafka.Writer{
		Addr:         kafka.TCP(strings.Split(brokers, ",")...),
		Topic:        topic,
		Balancer:     kafka.Murmur2Balancer{}, // as Java's: all producers put a user in the same partition
		RequiredAcks: kafka.RequireAll,
		BatchTimeout: 5 * time.Millisecond,
	}
	defer producer.Close()
	var messages []kafka.Message
	for _, push := range pushes {
		value, err := json.Marshal(push)
		if err != nil {
			return err
		}
		messages = append(messages, kafka.Message{Key: []byte(user), Value: value})
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := producer.WriteMessages(ctx, messages...); err != nil {
		return fmt.Errorf("Kafka did not accept the records: %w", err)
	}
	return nil
}

// connect connects to an access node; a refusal is an error with the node's reason.
func connect(url, token string) (*websocket.Conn, error) {
	dialer := websocket.Dialer{Subprotocols: []string{"barid.v1.json"}, HandshakeTimeout: 20 * time.Second}
	socket, response, err := dialer.Dial(url, http.Header{"Authorization": {"Bearer " + token}})
	if errors.Is(err, websocket.ErrBadHandshake) {
		reason, _ := io.ReadAll(response.Body)
		return nil, fmt.Errorf("refused by the node: %d %s", response.StatusCode, strings.TrimSpace(string(reason)))
	}
	return socket, err
}

// receive acts as the device: it handles each message once and in order, then acknowledges it.
func receive(socket *websocket.Conn, wanted map[string]bool) error {
	var handled uint64 // the last handled seq
	for len(wanted) > 0 {
		var frame serverFrame
		if err := socket.ReadJSON(&frame); err != nil {
			return fmt.Errorf("closed by the node: %w", err)
		}
		switch {
		case frame.Deliver != nil && frame.Deliver.Mailbox == "": // others are not acknowledged
			for _, message := range frame.Deliver.Messages {
				if message.Seq <= handled {
					continue // a re-send that crossed the acknowledgement
				}
				handled = message.Seq
				body := message.JSON
				if message.Text != nil {
					body, _ = json.Marshal(message.Text)
				} else if message.Data != nil {
					body, _ = json.Marshal(message.Data)
				}
				fmt.Printf("received %d %s %s\n", message.Seq, message.ID, body)
				delete(wanted, message.ID)
			}
			// Always name the generation: after a reset the same seq may be another message.
			answer := map[string]ack{"ack": {handled, frame.Deliver.Generation}}
			if err := socket.WriteJSON(answer); err != nil {
				return err
			}
		case frame.Skip != nil && frame.Skip.To > handled: // skips may be repeated
			handled = frame.Skip.To
		case frame.Welcome != nil:
			// The position of this device; Welcome is sent again if positions start anew.
			handled = 0
			for _, position := range frame.Welcome.Positions {
				if position.Mailbox == "" {
					handled = position.Seq
				}
			}
		case frame.Error != nil && frame.Error.Code != 0: // 0: a warning, the connection stays open
			return fmt.Errorf("error %d: %s", frame.Error.Code, frame.Error.Text)
		}
	}
	return nil
}

func run() error {
	if *token == "" {
		return errors.New("--token is missing; `barid token --user alice` prints one")
	}
	pushes := records(*app, *user)
	wanted := map[string]bool{}
	for _, push := range pushes {
		wanted[push.ID] = true
	}
	socket, err := connect(*url, *token)
	if err != nil {
		return err
	}
	defer socket.Close()
	if err := socket.WriteJSON(map[string]hello{"hello": {*device}}); err != nil {
		return err
	}
	ended := make(chan error, 2)
	go func() { ended <- produce(*brokers, *topic, *user, pushes) }()
	go func() { ended <- receive(socket, wanted) }()
	late := time.After(30 * time.Second)
	for range []string{"produced", "received"} {
		select {
		case err := <-ended:
			if err != nil {
				return err
			}
		case <-late:
			return errors.New("not everything arrived within 30 s; is the token that of --user?")
		}
	}
	// A close handshake after the last acknowledgement.
	bye := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")
	return socket.WriteControl(websocket.CloseMessage, bye, time.Now().Add(time.Second))
}

func main() {
	flag.Parse()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("all received and acknowledged")
}
