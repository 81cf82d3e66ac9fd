-- The log event of an entry of an inbox stream, nil for one that does not enter the log (core.wire.input_event,
-- answer_event).
local function taken_in(entry)
  local value = {}
  for i = 1, #entry[2], 2 do value[entry[2][i]] = entry[2][i + 1] end
  local said = ',"ts":' .. value.ts .. ',"data":{"message_id":"' .. value.id .. '","user_id":"' .. value.user .. '",'
  if value.kind == 'answer' then
    local turn = string.match(value.data, '^{"ask_id":"(t%d+)%.') or ''
    local data = string.match(value.data, '^{("ask_id":".*)$') or ('"data":' .. value.data .. '}')
    return '{"kind":"answer","turn":"' .. turn .. '"' .. said .. data .. '}'
  elseif value.kind == 'message' or value.kind == 'interrupting' or value.kind == 'alarm' then
    return '{"kind":"input","turn":"t' .. string.match(entry[1], '^%d+') .. '"' .. said .. '"data":' .. value.data
      .. (value.kind == 'alarm' and ',"alarm":true' or '') .. '}}'
  end
end
