-- Publications (core.wire); above LIMIT bytes of data only the numbers, and the receiver reads the stream.
local LIMIT = 8192
local function publish_log(channel, epoch, first, events, from)
  local size = 0
  for i = from, #events do size = size + #events[i] end
  local head = '{"t":"log","epoch":' .. epoch .. ',"seq":' .. first
  if size > LIMIT then
    redis.call('SPUBLISH', channel, head .. ',"n":' .. text(#events - from + 1) .. '}')
  else
    redis.call('SPUBLISH', channel, head .. ',"events":[' .. table.concat(events, ',', from) .. ']}')
  end
end
local function publish_inbox(channel, position, id, kind, user, ts, data)
  local head = '{"t":"in","pos":' .. position .. ',"id":"' .. id .. '","kind":"' .. kind .. '","user":"' .. user
    .. '","ts":' .. ts
  if #data <= LIMIT then head = head .. ',"data":' .. data end
  redis.call('SPUBLISH', channel, head .. '}')
end
local function publish_pieces(channel, epoch, pieces, from)
  local size = 0
  for i = from, #pieces do size = size + #pieces[i] end
  local head = '{"t":"piece","epoch":' .. epoch
  if size > LIMIT then
    redis.call('SPUBLISH', channel, head .. ',"n":' .. text(#pieces - from + 1) .. '}')
  else
    redis.call('SPUBLISH', channel, head .. ',"pieces":[' .. table.concat(pieces, ',', from) .. ']}')
  end
end
local function publish_status(channel, epoch, status)
  redis.call('SPUBLISH', channel, '{"t":"status","epoch":' .. epoch .. ',"status":"' .. status .. '"}')
end
