// Renders chat templates with Go's text/template, given what Ollama gives them (template/template.go of
// github.com/ollama/ollama: Messages, System, Response; option missingkey=zero).
//
// In: JSON lines {"template", "messages"} on stdin. Out: a JSON string a line on stdout.
// Run: go run tests/oracles/ollama_render.go < cases.jsonl

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

func main() {
	cases := json.NewDecoder(os.Stdin)
	out := json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	for cases.More() {
		var one struct {
			Template string    `json:"template"`
			Messages []message `json:"messages"`
		}
		if err := cases.Decode(&one); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		var system []string
		for _, m := range one.Messages {
			if m.Role == "system" {
				system = append(system, m.Content)
			}
		}
		var text bytes.Buffer
		parsed, err := template.New("").Option("missingkey=zero").Parse(one.Template)
		if err == nil {
			values := map[string]any{"Messages": one.Messages, "System": strings.Join(system, "\n\n"), "Response": ""}
			err = parsed.Execute(&text, values)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		out.Encode(text.String())
	}
}
